"""Sandbox of audio workers: nothing that a decoder was talked into reaches the machine, the network or a secret."""

from __future__ import annotations

import base64
import json
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serving.audio import sandbox
from serving.audio.decode import decode
from serving.audio.features import log_mel
from serving.audio.worker_pool import AudioWorkerPool
from serving.errors import AudioError
from tests.audio.clips import clip, clip_names
from tests.audio.escapes import HARMLESS
from tests.audio.puppets import MAX_AUDIO_S, pids, settings

ALLOWED, KILLED, EPERM, ENOSYS = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026

_LANDLOCKED = (
    *("execute", "spawn", "read a file", "list a directory", "write a file", "append to a file"),
    *("overwrite a file", "truncate a file", "delete a file", "rename a file", "make a directory", "make a link"),
    *("make a pipe", "environment of the parent", "memory of the parent", "own environment", "trace the parent"),
    *("read the parent", "change the root", "mount", "change the user"),
)
"""Attempts that fail without seccomp, too, by Landlock 1 and the lack of capabilities."""


def _escapes(directory: Path, *left_out: str) -> dict[str, Any]:
    secret = directory / "secret"
    secret.write_text("squeamish ossifrage")
    writable = directory / "writable"
    writable.mkdir()
    command = [sys.executable, "-m", "tests.audio.escapes", str(secret), str(writable), *left_out]
    done = subprocess.run(command, capture_output=True, timeout=120, check=True)
    results: dict[str, Any] = json.loads(done.stdout)
    return results


def test_every_way_out_is_closed(tmp_path: Path) -> None:
    """No attempt to reach a file, the network, another process or more rights succeeds; no protection is missing."""
    results = _escapes(tmp_path)
    assert results.pop("missing") == []
    assert [name for name, error in results.items() if error is None] == []
    assert (tmp_path / "writable" / "kept").read_bytes() == b"kept"
    assert {each.name for each in (tmp_path / "writable").iterdir()} == {"kept", "delete", "rename"}


def test_without_landlock_every_way_out_is_closed(tmp_path: Path) -> None:
    """Seccomp alone closes every way out: many kernels run without Landlock. The lack is reported."""
    results = _escapes(tmp_path, "landlock")
    assert results.pop("missing") == ["landlock"]
    assert [name for name, error in results.items() if error is None] == []


def test_without_seccomp_files_and_processes_stay_closed(tmp_path: Path) -> None:
    """Landlock and the lack of capabilities close files and processes without seccomp."""
    results = _escapes(tmp_path, "seccomp")
    assert results.pop("missing") == ["seccomp"]
    assert [name for name in _LANDLOCKED if results[name] is None] == []


def test_attempts_succeed_outside_the_sandbox(tmp_path: Path) -> None:
    """Attempts of the kinds above succeed without a sandbox, so their failure is the sandbox's doing."""
    results = _escapes(tmp_path, "all")
    assert results == {"missing": [], **dict.fromkeys(HARMLESS)}


def _action(program: bytes, architecture: int, number: int, *arguments: int) -> int:
    """Run a filter on one system call as the kernel does."""
    padded = (*arguments, *[0] * (6 - len(arguments)))
    data = struct.pack("<IIQ6Q", number, architecture, 0, *padded)
    instructions = list(struct.iter_unpack("=HBBI", program))
    accumulator = position = 0
    while True:
        code, if_true, if_false, value = instructions[position]
        position += 1
        match code:
            case 0x20:
                accumulator = struct.unpack_from("<I", data, value)[0]
            case 0x15:
                position += if_true if accumulator == value else if_false
            case 0x35:
                position += if_true if accumulator >= value else if_false
            case 0x06:
                return int(value)


@pytest.mark.parametrize(("machine", "column", "architecture"), [("x86_64", 0, 0xC000003E), ("aarch64", 1, 0xC00000B7)])
def test_only_the_listed_calls_are_allowed(machine: str, column: int, architecture: int) -> None:
    """Listed calls are allowed, some with certain arguments alone; all others fail, and another architecture kills."""
    program = sandbox.seccomp_program(machine, 1234)
    limited = {"fcntl": (0, 8), "ioctl": (0, 0x5412), "prctl": (4,), "prlimit64": (77,), "tgkill": (77,)}
    allowed = set()
    for name, numbers in sandbox.SYSCALLS.items():
        if numbers[column] < 0:
            continue
        allowed.add(numbers[column])
        expected = EPERM if name in limited else ALLOWED
        assert _action(program, architecture, numbers[column], *limited.get(name, ())) == expected, name
    for name, arguments in {"fcntl": (0, 1), "ioctl": (0, 0x5401), "prctl": (15,), "tgkill": (1234,)}.items():
        assert _action(program, architecture, sandbox.SYSCALLS[name][column], *arguments) == ALLOWED
    for number in {*range(1000), *range(0x40000000, 0x40000400)} - allowed:
        assert _action(program, architecture, number) == (ENOSYS if number >= 424 else EPERM)
    other = {0xC000003E: 0xC00000B7, 0xC00000B7: 0xC000003E}[architecture]
    assert _action(program, other, 0) == KILLED
    assert _action(program, 0x40000003, 0) == KILLED  # i386 on x86-64


def _header_numbers(header: str) -> dict[str, int]:
    found = {}
    for name, number in re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", Path(header).read_text()):
        found[name] = int(number)
    return found


@pytest.mark.parametrize(
    ("header", "column", "renamed"),
    [
        ("/usr/include/x86_64-linux-gnu/asm/unistd_64.h", 0, {}),
        ("/usr/include/asm-generic/unistd.h", 1, {"newfstatat": "fstatat"}),
    ],
)
def test_numbers_of_system_calls_are_those_of_the_kernel(header: str, column: int, renamed: dict[str, str]) -> None:
    """Numbers equal those of the kernel's own headers on both architectures."""
    if not Path(header).exists():
        pytest.skip("needs the kernel's headers")
    kernel = _header_numbers(header)
    for name, numbers in sandbox.SYSCALLS.items():
        if numbers[column] >= 0:
            assert numbers[column] == kernel[renamed.get(name, name)], name
        else:
            assert name not in kernel or header.endswith("generic/unistd.h"), name


def _status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def _seen_from_outside(pid: int) -> tuple[str, list[str], list[str]]:
    """Return a process's limits, its environment, and the targets of its first three descriptors."""
    process = Path(f"/proc/{pid}")
    environment = (process / "environ").read_bytes().decode()
    outputs = [str((process / "fd" / stream).readlink()) for stream in "012"]
    return (process / "limits").read_text(), environment.split("\0"), outputs


async def test_workers_of_the_pool_are_in_the_sandbox(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A worker has a filter, no rights, small limits, no output of the service, and allowed variables alone."""
    for name in ("RAY_AUTH_TOKEN", "AWS_SECRET_ACCESS_KEY", "CAPTIONER_KEY_PEPPER", "DATABASE_PASSWORD", "HF_TOKEN"):
        monkeypatch.setenv(name, "squeamish ossifrage")
    monkeypatch.setenv("LC_TIME", "C")
    pool = AudioWorkerPool(settings(audio_workers=1))
    await pool.start()
    try:
        (pid,) = pids(pool)
        status = _status(pid)
        assert (status["NoNewPrivs"], status["Seccomp"], status["Threads"]) == ("1", "2", "1")
        assert {int(status[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")} == {0}
        limits, environment, outputs = _seen_from_outside(pid)
        assert re.search(r"Max processes +0 +0", limits)
        assert re.search(r"Max open files +32 +32", limits)
        assert re.search(r"Max file size +5016576 +5016576", limits)  # the pieces of 62 s, and their table
        assert outputs == ["/dev/null"] * 3
        names = {each.partition("=")[0] for each in environment if each}
        fixed = {"OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "PYTHONPATH", "LC_TIME"}
        assert fixed <= names
        assert names - fixed <= {"LANG", "LANGUAGE", "LD_LIBRARY_PATH", "PATH", "PYTHONHOME", "TZ"} | {
            *(name for name in names if name.startswith(("LC_", "MALLOC_")))
        }
    finally:
        await pool.stop()
    assert [each for each in caplog.records if "lack" in each.getMessage()] == []


async def test_a_lack_of_the_kernel_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """Workers that run without a protection are reported once, with its name, and work."""
    program = (
        "import sys; from serving.audio import sandbox, worker; "
        "sandbox._restrict_by_landlock = lambda: False; worker.main(sys.argv[1:])"
    )
    pool = AudioWorkerPool(settings(audio_workers=2), program=("-c", program))
    await pool.start()
    try:
        async with pool.prepare(base64.b64encode(clip("WAV PCM 16").data).decode()) as prepared:
            assert prepared.features.samples
    finally:
        await pool.stop()
    message = "audio workers lack protections that this kernel does not have"
    (record,) = [each for each in caplog.records if each.getMessage() == message]
    assert vars(record)["missing"] == ["landlock"]


async def test_every_format_is_decoded_in_the_sandbox(tmp_path: Path) -> None:
    """Every format, complete and cut, has the same features or error in a worker as outside of the sandbox."""
    pool = AudioWorkerPool(settings(audio_workers=1))
    await pool.start()
    try:
        for name in clip_names():
            for data in (clip(name).data, clip(name).data[: len(clip(name).data) // 2]):
                file = tmp_path / "clip"
                file.write_bytes(data)
                for source in (file, base64.b64encode(data).decode()):
                    assert await _result(pool, source) == _expected(data), name
        for text in (b"<html>", "\ufefftext".encode(), "text".encode("utf-16"), b"\xff\xfe\0", b"caf\xe9", b""):
            assert await _result(pool, base64.b64encode(text).decode()) == _expected(text), text
        assert pool.deaths == 0
    finally:
        await pool.stop()


async def _result(pool: AudioWorkerPool, source: Path | str) -> object:
    try:
        async with pool.prepare(source) as prepared:
            return prepared.features.log_mel.tobytes()
    except AudioError as error:
        return type(error), str(error)


def _expected(data: bytes) -> object:
    try:
        return np.ascontiguousarray(log_mel(decode(data, max_duration_s=MAX_AUDIO_S))).tobytes()
    except AudioError as error:
        return type(error), str(error)
