"""`captioner caption`: clips, formats, order, exit statuses; against scripted answers and the service itself."""

from __future__ import annotations

import base64
import json
import os
import re
import sys
from pathlib import Path

import pytest

from serving.cli.caption import discovery, embedded
from serving.cli.main import main
from tests.cli.scripted_service import Answer, ScriptedService, stream

SAMPLE = Path(__file__).parents[2] / "serving" / "embedded" / "sample.mp3"
CAPTIONER = Path(sys.executable).with_name("captioner")


@pytest.fixture
def clips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files of two clips, one of them in a directory, next to what is no clip; the working directory."""
    monkeypatch.chdir(tmp_path)
    for name in ("CAPTIONER_URL", "CAPTIONER_KEY"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "in" / "b.MP3").write_bytes(b"second")
    (tmp_path / "in" / "deep" / "c.mkv").write_bytes(b"third")
    (tmp_path / "in" / "deep" / ".hidden.wav").write_bytes(b"x")
    (tmp_path / "in" / "readme.txt").write_text("no clip")
    (tmp_path / "a").write_bytes(b"first")
    return tmp_path


def sent(running: ScriptedService) -> list[str]:
    """Return the contents of the files that requests carried, or the addresses."""
    data = [each["messages"][0]["content"][0]["input_audio"]["data"] for each in running.requests]
    return [base64.b64decode(each[13:]).decode() if each.startswith("data:;base64,") else each for each in data]


def test_files_directories_patterns_and_addresses_in_order(clips: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A directory stands for the audio and video below it; a file that is named needs no suffix."""
    with ScriptedService(stream("x")) as running:
        words = ["in", "a", "in/**/*.mkv", "https://example.com/d.mp3"]
        assert main(["caption", "--url", running.url, "--jobs=1", *words]) == 0
    assert sent(running) == ["second", "third", "first", "third", "https://example.com/d.mp3"]
    assert capsys.readouterr().out == (
        "==> in/b.MP3 <==\nx\n\n==> in/deep/c.mkv <==\nx\n\n==> a <==\nx\n\n==> in/deep/c.mkv <==\nx\n\n"
        "==> https://example.com/d.mp3 <==\nx\n"
    )


def test_failed_clips_do_not_stop_the_others(clips: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each failure is one line with the clip's name, and the exit status is 1."""
    (clips / "empty").touch()
    refused = Answer(400, '{"error": {"message": "It is text.", "code": "invalid_parameter_error"}}')
    with ScriptedService(refused, stream("x")) as running:
        words = ["in/b.MP3", "gone", "a", "empty", "*.none", "in/none"]
        (clips / "in" / "none").mkdir()
        assert main(["caption", "--url", running.url, "--jobs=1", *words]) == 1
    out, err = capsys.readouterr()
    assert out == "==> a <==\nx\n"
    assert err.splitlines() == [
        "captioner: in/b.MP3: It is text.",
        "captioner: gone: no such file",
        "captioner: empty: the file is empty",
        "captioner: *.none: no file matches the pattern",
        "captioner: in/none: the directory has no audio or video file",
    ]


def test_json_is_one_object_a_line(clips: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A failed clip has its error in the place of its caption."""
    refused = Answer(400, '{"error": {"message": "It is text.", "code": "invalid_parameter_error"}}')
    with ScriptedService(stream("ü", captioner={"stopped": "loop"}), refused) as running:
        assert main(["caption", "--url", running.url, "--jobs=1", "--format=json", "a", "in/b.MP3"]) == 1
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == [
        {"file": "a", "caption": "ü", "finish_reason": "stop", "stopped": "loop", "usage": {"total_tokens": 3}},
        {
            "file": "in/b.MP3",
            "error": {"message": "It is text.", "code": "invalid_parameter_error", "status": 400},
        },
    ]


def test_markdown_and_files_of_results(clips: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--output` writes a file for each clip, in the tree of the directory; else a heading stands above each."""
    with ScriptedService(stream("x")) as running:
        assert main(["caption", "--url", running.url, "--format=md", "a", "in/b.MP3"]) == 0
        assert capsys.readouterr().out == "## a\n\nx\n\n## in/b.MP3\n\nx\n"
        assert main(["caption", "--url", running.url, "--output=out", "in", "a"]) == 0
        assert capsys.readouterr() == ("", "")
        assert main(["caption", "--url", running.url, "--output=out", "a", "*.none"]) == 1
    found = {str(path.relative_to("out")): path.read_text() for path in Path("out").rglob("*") if path.is_file()}
    assert found == {"b.MP3.txt": "x\n", "deep/c.mkv.txt": "x\n", "a.txt": "x\n"}


def test_results_are_in_the_order_of_the_clips(clips: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A clip that is ready before an earlier one waits for it."""
    names = [f"{number}.wav" for number in range(12)]
    for name in names:
        (clips / name).write_bytes(name.encode())
    with ScriptedService(*[stream("x"), Answer(503, "", retry_after="0")] * 6, stream("x")) as running:
        assert main(["caption", "--url", running.url, "--jobs=6", *names]) == 0
    assert re.findall("==> (.*) <==", capsys.readouterr().out) == names
    assert sorted(set(sent(running))) == sorted(names)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: FILE|DIR|URL; see `captioner caption --help`"),
        (["--jos=1", "a"], "unknown option --jos (did you mean --jobs?); see `captioner caption --help`"),
        (["--jobs=0", "a"],
         "argument --jobs: must be a whole number, 1 to 64, not '0'; see `captioner caption --help`"),
        (["--format=xml", "a"], None),
        (["--url=ftp://x", "a"], "--url: must be an address such as http://127.0.0.1:8000, not 'ftp://x'"),
        (["--url=http://x", "--embedded", "a"], "--embedded and --url contradict each other; leave one out"),
        (["--url=http://x", "-", "-"], "standard input (-) can be one clip alone"),
        (["--url=http://x", "-o", "out", "a", "a"],
         "a and a would both be written to out/a.txt; caption them apart"),
    ],
)  # fmt: skip
def test_wrong_options_exit_with_2(
    words: list[str], message: str | None, clips: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line says what is wrong; nothing is sent."""
    try:
        status = main(["caption", *words])
    except SystemExit as ended:
        status = ended.code  # type: ignore[assignment] # a number
    assert status == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert message is None or err == f"captioner: {message}\n"


def test_address_and_key_of_the_environment(
    clips: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`CAPTIONER_URL` and `CAPTIONER_KEY` stand for the options, which come first; an empty one counts as none."""
    with ScriptedService(stream("x")) as running:
        monkeypatch.setenv("CAPTIONER_URL", running.url)
        monkeypatch.setenv("CAPTIONER_KEY", "sk-1")
        assert main(["caption", "a"]) == 0
        assert main(["caption", "--key=sk-2", "a"]) == 0
        monkeypatch.setenv("CAPTIONER_KEY", "")
        assert main(["caption", "a"]) == 0
    assert [headers.get("authorization") for headers in running.headers] == ["Bearer sk-1", "Bearer sk-2", None]
    assert capsys.readouterr().err == ""


def test_a_refused_key_names_the_remedy(clips: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before any clip is sent, if the list of models needs the key."""
    refused = Answer(401, '{"error": {"message": "Incorrect API key provided.", "code": "invalid_api_key"}}')
    with ScriptedService(refused) as running:
        assert main(["caption", "--url", running.url, "a"]) == 1
    assert capsys.readouterr().err == (
        "captioner: a: the service refuses the key: Incorrect API key provided. Pass --key or set CAPTIONER_KEY\n"
    )


def test_a_running_service_is_found_and_used(
    clips: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A captioner of this user on the default port is used, which one line says; another program there is none."""
    with ScriptedService(stream("x"), ready=Answer(404)) as other:
        assert discovery.running(int(other.url.rpartition(":")[2])) is None
    with ScriptedService(stream("x")) as running:
        port = int(running.url.rpartition(":")[2])
        find = discovery.running
        monkeypatch.setattr(discovery, "running", lambda: find(port))
        assert main(["caption", "a"]) == 0
    assert capsys.readouterr() == ("x\n", f"captioner: using the service on {running.url}\n")
    assert find(port) is None  # it has ended


def test_a_program_of_another_user_is_not_used(tmp_path: Path) -> None:
    """The kernel's table says whose a listener is; only this user's and root's get the clips and the key."""
    table = tmp_path / "tcp"
    row = (
        "   0: 0100007F:1F40 00000000:0000 {state} 00000000:00000000 00:00000000 00000000 {user} 0 1 1 0 100 0 0 10 0\n"
    )
    for user, state, expected in ((os.getuid(), "0A", True), (0, "0A", True), (4242, "0A", False), (4242, "01", True)):
        table.write_text(f"header\n{row.format(user=user, state=state)}")
        assert discovery._is_ours(8000, (table,)) is expected


def test_without_vllm_and_service_a_line_says_what_to_do(
    clips: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client alone cannot start a service."""
    monkeypatch.setattr(discovery, "running", lambda: None)
    monkeypatch.setattr(embedded, "installed", lambda: False)
    assert main(["caption", "a"]) == 2
    assert capsys.readouterr().err == (
        "captioner: no service runs on 127.0.0.1:8000, and vLLM is not installed here; "
        "pass --url, or install captioner with its extra `cpu`\n"
    )
