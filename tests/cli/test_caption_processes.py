"""`captioner caption` as a process: its own service, standard input, a terminal, large files, imports."""

from __future__ import annotations

import base64
import io
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import soundfile

from serving.cli.caption import command, discovery, embedded
from serving.cli.caption.shrink import shrink
from serving.cli.caption.sources import MAX_INLINE_BYTES, expand
from serving.cli.main import main
from tests.cli.scripted_service import Answer, ScriptedService, stream

if TYPE_CHECKING:
    from tests.support.service import RunningService

SAMPLE = Path(__file__).parents[2] / "serving" / "embedded" / "sample.mp3"
CAPTIONER = Path(sys.executable).with_name("captioner")


def test_a_service_is_started_and_stopped(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The command's own service has its own key and state, and none of the environment's settings; it ends with it."""
    monkeypatch.setattr(discovery, "running", lambda: None)
    started: list[embedded.EmbeddedService] = []

    class WithFakeEngine(embedded.EmbeddedService):
        def __init__(self, *_: object) -> None:
            super().__init__(engine="fake")
            started.append(self)

    monkeypatch.setattr(embedded, "EmbeddedService", WithFakeEngine)
    monkeypatch.setenv("CAPTIONER_PORT", "wrong")
    assert main(["caption", str(SAMPLE)]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("This clip of 5.54 seconds")
    assert err == (
        "captioner: no service runs on 127.0.0.1:8000; starting the embedded stand-in, a small model that is often "
        "wrong (--url: another service)\n"
    )
    (own,) = started
    assert own._process.returncode == 0
    assert not Path(own._directory.name).exists()


def test_a_start_that_fails_is_one_line() -> None:
    """The line has the service's own error."""
    with pytest.raises(embedded.StartError) as raised, embedded.EmbeddedService(engine="none"):
        pass
    assert str(raised.value) == (
        "the embedded service did not start: engine: must be one of vllm, fake, not 'none'; "
        "set --engine or CAPTIONER_ENGINE"
    )


def test_the_service_ends_with_the_command_that_is_killed(tmp_path: Path) -> None:
    """A command that is killed leaves no service behind."""
    code = (
        "import os, signal\nfrom serving.cli.caption.embedded import EmbeddedService\n"
        "with EmbeddedService(engine='fake') as own:\n"
        "    print(own._process.pid, flush=True)\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL
    service = Path("/proc") / done.stdout.strip()
    deadline = time.monotonic() + 30
    while service.exists() and "Z" not in (service / "stat").read_text().split()[2] and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not service.exists() or "Z" in (service / "stat").read_text().split()[2]


def test_standard_input_and_an_interrupt(fake_service: RunningService) -> None:
    """`-` reads a clip from standard input; Ctrl-C ends with status 130 and one line."""
    command = [str(CAPTIONER), "caption", "--url", fake_service.url]
    done = subprocess.run([*command, "-"], input=SAMPLE.read_bytes(), capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.startswith(b"This clip of 5.54 seconds")
    with ScriptedService(Answer(503, "{}", retry_after="60")) as busy:
        command = [str(CAPTIONER), "caption", "--url", busy.url, str(SAMPLE)]
        with subprocess.Popen(command, stderr=subprocess.PIPE) as waiting:
            assert waiting.stderr is not None
            first = waiting.stderr.readline()
            assert first == f"captioner: {SAMPLE}: HTTP 503; retrying in 60.0 s\n".encode()
            waiting.send_signal(signal.SIGINT)
            _, err = waiting.communicate(timeout=20)
    assert (waiting.returncode, err) == (130, b"captioner: interrupted\n")


@pytest.mark.parametrize("no_color", ["", "1"])
def test_a_terminal_shows_progress_and_colours(no_color: str, tmp_path: Path) -> None:
    """Progress is one line that is erased; names are bold unless NO_COLOR is set."""
    with ScriptedService(Answer(503, "", retry_after="0"), stream("a dog"), stream("a cat")) as running:
        parent, child = pty.openpty()
        process = subprocess.Popen(
            [str(CAPTIONER), "caption", "--url", running.url, "--jobs=1", str(SAMPLE), str(SAMPLE)],
            stdout=child,
            stderr=child,
            env=os.environ | {"TERM": "xterm", "NO_COLOR": no_color},
        )
        os.close(child)
        shown = b""
        try:
            while piece := os.read(parent, 4096):
                shown += piece
        except OSError:  # the terminal's other end is closed
            pass
        os.close(parent)
    assert process.wait(20) == 0
    text = shown.decode()
    assert re.search(r"0 of 2 done · .*sample\.mp3 · \d+ s\r\x1b\[K", text)
    assert ("\x1b[1m==> " in text) is (not no_color)
    assert text.rstrip().endswith("a cat")


def test_large_files_are_sent_as_the_model_hears_them(tmp_path: Path) -> None:
    """A file over the bound is sent as 16 kHz mono: FLAC, which loses nothing that the model hears, else Opus."""
    seconds = 50
    noise = (np.random.default_rng(0).standard_normal((48_000 * seconds, 2)) * 0.1).astype(np.float32)
    soundfile.write(tmp_path / "large.wav", noise, 48_000, subtype="FLOAT")
    (source,) = expand([str(tmp_path / "large.wav")])
    lines: list[str] = []
    content = base64.b64decode(source.data(lines.append).removeprefix("data:;base64,"))
    about = soundfile.info(io.BytesIO(content))
    assert (about.format, about.samplerate, about.channels, about.duration) == ("FLAC", 16_000, 1, seconds)
    assert re.fullmatch(r"19\.2 MB are too large for a request; sent as 16 kHz mono, 1\.\d MB", lines[0])
    small = shrink(noise[: 16_000 * 20, 0], most=100_000)
    assert len(small) <= 100_000
    assert soundfile.info(io.BytesIO(small)).subtype == "OPUS"
    (tmp_path / "large.wav").write_bytes(b"text" * MAX_INLINE_BYTES)
    with pytest.raises(Exception, match=r"^The audio format is illegal and cannot be opened: it is text$"):
        source.data()


def test_help_imports_nothing_heavy() -> None:
    """Help and version need neither the engine nor what the service is made of, and so no second."""
    heavy = {"vllm", "torch", "ray", "numpy", "pydantic", "sqlalchemy", "starlette", "aiohttp", "asyncio", "av"}
    for words in (["--help"], ["--version"], ["caption", "--help"]):
        code = (
            "import sys\nfrom serving.cli.main import main\n"
            f"try:\n    main({words!r})\nexcept SystemExit:\n    pass\n"
            "print(*{name.partition('.')[0] for name in sys.modules}, file=sys.stderr)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
        assert heavy & set(done.stderr.split()) == set(), words
        assert "captioner" in done.stdout


def test_the_exit_statuses_are_those_of_the_help() -> None:
    """The help names each status."""
    text = command.parser().format_help()
    assert "Exit status: 0 all clips have a caption; 1 some have none;\n2 wrong options; 130 interrupted." in text
