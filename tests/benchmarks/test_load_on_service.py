"""Load on this service with the fake engine: every way, form, codec and length, by two tenants."""

from __future__ import annotations

import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

import pytest

from benchmarks.cluster.callers import Callers
from tests.benchmarks.locust_runs import run
from tests.support.service import RunningService

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

KEYS = ("sk-benchmark-one", "sk-benchmark-two")


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Log nothing."""


@pytest.fixture(scope="module")
def clips_url(clips: Path) -> Iterator[str]:
    """URL of the clips' directory."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(clips)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def service() -> Iterator[str]:
    """URL of the service."""
    flags = ("--engine=fake", "--audio-workers=1", "--fetch-allow=127.0.0.0/8", "--allow-ignore-eos")
    with RunningService(*flags, f"--api-keys={','.join(KEYS)}") as running:
        yield running.url


def test_every_way_form_and_codec_by_two_tenants(service: str, clips: Path, clips_url: str, tmp_path: Path) -> None:
    """Every combination of the options is right by every check, that of usage included."""
    ways, forms = "openai-stream,openai,dashscope-stream,dashscope", "data,base64,url,upload"
    codecs = "mp3,m4a,opus,amr,wav,flac"
    flags = (f"--ways={ways}", f"--forms={forms}", f"--codecs={codecs}", f"--clips-url={clips_url}", "--mix=effects")
    more = ("--seconds=8", "--load=3", "--probe-share=0")
    status, entries, printed = run(service, clips, tmp_path / "journal", *flags, *more, keys=f"{KEYS[0]}=2,{KEYS[1]}=1")
    assert status == 0, printed + str([one for one in entries if one["outcome"] != "right"][:3])
    for name, wanted in (("way", ways), ("form", forms), ("codec", codecs)):
        assert {one[name] for one in entries} == set(wanted.split(","))
    assert {one["tenant"] for one in entries} == {0, 1}
    assert not list(clips.glob("served-*"))


def test_a_fixed_length_and_an_unknown_key(service: str, clips: Path, tmp_path: Path) -> None:
    """Every caption has the requested tokens; with an unknown key every request fails."""
    status, entries, printed = run(
        service, clips, tmp_path / "set", "--tokens=40", "--ways=openai,dashscope", keys=KEYS[0]
    )
    assert status == 0, printed
    assert {one["tokens"] for one in entries} == {40}
    status, entries, _ = run(service, clips, tmp_path / "unknown", keys="sk-nobody")
    assert status == 3
    assert {one["outcome"] for one in entries} == {"failed"}


def test_podcasts(service: str, clips: Path, clips_url: str, tmp_path: Path) -> None:
    """Clips of up to 40 minutes, which do not fit into a request, are served behind URLs."""
    flags = ("--mix=podcasts,2390", "--forms=url", f"--clips-url={clips_url}", "--load=1", "--seconds=4")
    more = ("--codecs=opus", "--probe-share=0", "--arrivals=even", "--user-rate=1")
    status, entries, printed = run(service, clips, tmp_path / "journal", *flags, *more, keys=KEYS[0])
    assert status == 0, [one for one in entries if one["outcome"] != "right"] or printed
    assert min(one["audio_s"] for one in entries) >= 299


def test_callers_account_for_every_request(clips: Path, tmp_path: Path) -> None:
    """Requests of a cluster's callers are answered right, in all ways; captions of other words are defects."""
    with RunningService("--engine=fake", "--audio-workers=1", "--fake-tokens=24") as running:
        callers = Callers(running.url, tmp_path, 4, max_pause_s=0.1, tokens=24, clips_dir=clips)
        with callers:
            deadline = time.monotonic() + 60
            while len(callers.answered()) < 40 and time.monotonic() < deadline:
                time.sleep(0.2)
        account = callers.account()
        assert account["details"] == {}
        assert account["sent"] == account["answered"] >= 40
        assert account["defects"] == []
        assert len(account["by_way"]) == 4
        others = Callers(running.url, tmp_path, 1, max_pause_s=0.1, tokens=25, clips_dir=clips, name="others")
        with others:
            while not others.ended():
                time.sleep(0.2)
    account = others.account()
    assert account["sent"] == account["defect"] > 0
