"""`captioner caption --timeline`: captions with times, as text, JSON, Markdown and subtitles."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from serving.cli.main import main
from tests.cli.scripted_service import ScriptedService
from tests.cli.test_caption_client import timeline_stream

if TYPE_CHECKING:
    from pathlib import Path

pytest.importorskip("serving.timeline")

FIRST = {"index": 0, "start": 0.0, "end": 29.96, "caption": "A dog | barks."}
SECOND = {"index": 1, "start": 29.96, "end": 3661.2, "caption": "", "error": "internal_error"}


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("text", "0:00.0-0:30.0  A dog | barks.\n0:30.0-1:01:01.2  [internal_error]\n"),
        ("md", ("## a\n\n| Time | Caption |\n|---|---|\n| 0:00.0-0:30.0 | A dog &#124; barks. |\n"
         "| 0:30.0-1:01:01.2 | [internal_error] |\n")),
        ("srt", "1\n00:00:00,000 --> 00:00:29,960\nA dog | barks.\n\n"),
        ("vtt", "WEBVTT\n\n00:00:00.000 --> 00:00:29.960\nA dog | barks.\n\n"),
    ],
)  # fmt: skip
def test_formats_of_a_timeline(
    form: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Text and Markdown have a line for each segment; subtitles are those of the service's timelines."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").write_bytes(b"clip")
    flags = ["--timeline"] if form in {"text", "md"} else []
    with ScriptedService(timeline_stream([FIRST], [SECOND])) as running:
        assert main(["caption", "--url", running.url, f"--format={form}", *flags, "a"]) == 0
        assert capsys.readouterr().out == expected
        assert main(["caption", "--url", running.url, f"--format={form}", *flags, "-o", "out", "a"]) == 0
    assert [path.read_text() for path in (tmp_path / "out").iterdir()] == [expected]


def test_json_has_the_segments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The segments are the service's own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").write_bytes(b"clip")
    with ScriptedService(timeline_stream([FIRST, SECOND])) as running:
        assert main(["caption", "--url", running.url, "--format=json", "--timeline", "a"]) == 0
    assert json.loads(capsys.readouterr().out)["segments"] == [FIRST, SECOND]


def test_subtitles_of_several_clips_need_a_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two files of subtitles in one stream are none."""
    assert main(["caption", "--url=http://127.0.0.1:1", "--format=srt", "a", "b"]) == 2
    assert capsys.readouterr().err == (
        "captioner: --format srt of several clips needs --output DIR: each has a file of its own\n"
    )
