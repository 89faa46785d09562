"""The machine: memory, shared memory, disks, descriptors, port."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import socket
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from serving.cli.doctor.findings import Finding, error, ok, warning
from serving.cli.doctor.fit import CHECKPOINT_GIB, is_captioner
from serving.cli.doctor.gpu import has_cuda_build

if TYPE_CHECKING:
    from collections.abc import Iterator

    from serving.config import Settings

GIB = 1 << 30

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")
SHM = Path("/dev/shm")  # noqa: S108 - the kernel's shared memory

_SHM_LEAST_GIB = 0.25
"""vLLM's message queue between the GPUs' processes takes 10 chunks of 16 MiB, and NCCL its own segments."""
_SHM_PER_GPU_GIB = 1.0
_ENGINE_GIB = {True: 8.0, False: 2.2}
"""Resident memory of one engine process on a GPU (estimate of the chart's profiles) and on the CPU (measured)."""
_FURTHER_PROCESS_GIB = 6.0
_FRONTEND_GIB = 2.0
_AUDIO_WORKER_GIB = 0.5

_DESCRIPTORS_PER_REQUEST = 4
_OWN_DESCRIPTORS = 256


def memory(settings: Settings, *, engine: bool, frontend: bool) -> Iterator[Finding]:
    """Yield whether the RAM that is available holds the processes, their buffers and a CPU engine's model."""
    needed = 0.0
    if engine:
        cuda = bool(has_cuda_build())
        needed += _ENGINE_GIB[cuda] + (settings.tensor_parallel - 1) * _FURTHER_PROCESS_GIB
        if not cuda:
            weights = 0.1 if settings.is_embedded else CHECKPOINT_GIB if is_captioner(settings.model) else 0
            needed += settings.cpu_kv_cache_gib * settings.tensor_parallel + weights
    if frontend:
        buffers = (settings.max_body_memory_bytes + settings.max_features_bytes) / GIB
        needed += _FRONTEND_GIB + buffers + _AUDIO_WORKER_GIB * settings.audio_workers
    available, source = _available_gib()
    text = f"{available:.1f} GiB available ({source}), {needed:.1f} needed at most"
    if available >= needed:
        yield ok("ram", text)
    else:
        yield warning(
            "ram",
            f"{text}: the kernel may end processes under load",
            "give the machine or container more memory, or lower cpu_kv_cache_gib, audio_workers, "
            "max_body_memory_bytes or max_features_bytes",
        )


def _available_gib() -> tuple[float, str]:
    """Return the memory that new processes can have: the kernel's figure, or what the container's limit leaves."""
    lines = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines() if ":" in line)
    found = int(lines["MemAvailable"].split()[0]) / (1 << 20), "MemAvailable"
    try:
        limit = (CGROUP / "memory.max").read_text().strip()
        used = int((CGROUP / "memory.current").read_text())
        cached = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())["inactive_file"]
    except (OSError, ValueError, KeyError):
        return found
    if limit == "max":
        return found
    return min(found, ((int(limit) - used + int(cached)) / GIB, "limit of the container"))


def shared_memory(settings: Settings) -> Iterator[Finding]:
    """Yield whether NCCL is installed and /dev/shm has room for the processes of one engine."""
    if settings.tensor_parallel == 1:
        yield ok("shm", "tensor_parallel is 1: one engine needs neither NCCL nor /dev/shm between its processes")
        return
    if has_cuda_build():
        try:
            yield ok("nccl", f"NCCL {version('nvidia-nccl-cu13')}")
        except PackageNotFoundError:
            yield error("nccl", "NCCL is not installed", "install the locked requirements (deploy/requirements)")
    free = shutil.disk_usage(SHM).free / GIB
    wanted = _SHM_PER_GPU_GIB * settings.tensor_parallel
    text = f"{free:.2f} GiB free in {SHM}, {wanted:g} wanted for {settings.tensor_parallel} processes"
    remedy = "docker run --shm-size=16g (or --ipc=host); engine.shmSize in the chart"
    if free < _SHM_LEAST_GIB:
        yield error("shm", f"{text}; below {_SHM_LEAST_GIB} they cannot start", remedy)
    elif free < wanted:
        yield warning("shm", text, remedy)
    else:
        yield ok("shm", text)


def directories(settings: Settings) -> Iterator[Finding]:
    """Yield whether the directories of data, uploads and downloads can be written and hold what the settings allow."""
    uploads = settings.uploads_dir or settings.data_dir / "uploads"
    downloads = settings.download_dir or Path(os.environ.get("TMPDIR") or "/tmp")  # noqa: S108 - only to look at
    yield from _directory("data_dir", settings.data_dir, settings.max_journal_bytes, "max_journal_bytes", fatal=True)
    # With a bucket it holds copies of files that are read.
    bound = "max_uploads_bytes" if settings.object_store_url is None else "max_downloads_bytes"
    yield from _directory("uploads_dir", uploads, getattr(settings, bound), bound)
    yield from _directory("download_dir", downloads, settings.max_downloads_bytes, "max_downloads_bytes")


def _directory(name: str, path: Path, needed: int, setting: str, *, fatal: bool = False) -> Iterator[Finding]:
    parent = path
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    try:
        if not parent.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "not a directory")
        if not os.access(parent, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, "permission denied")
        state = os.statvfs(parent)
    except OSError as failure:
        remedy = f"make {path} a directory that this user can write, or set {name}"
        yield error("disk", f"{name} {path} cannot be used: {parent}: {failure.strerror}", remedy)
        return
    if state.f_flag & os.ST_RDONLY:
        yield error("disk", f"{name} {path} is on a read-only file system", f"set {name} to a disk that can be written")
        return
    free = state.f_bavail * state.f_frsize
    text = f"{name} {path}: {free / GIB:.1f} GiB free, {setting} allows {needed / GIB:.2f}"
    remedy = f"free space, set {name} to a larger disk, or lower {setting}"
    if state.f_files and not state.f_favail:
        yield error("disk", f"{name} {path}: no inodes are free", f"delete files, or set {name} to another disk")
    elif free >= needed:
        yield ok("disk", text)
    elif fatal:
        yield error("disk", f"{text}: requests are refused when the journal cannot grow", remedy)
    else:
        yield warning("disk", f"{text}: requests that need more are refused", remedy)


def descriptors(settings: Settings) -> Iterator[Finding]:
    """Yield whether the hard limit of open files allows `max_concurrent_requests`; the service raises the soft one."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    requests = settings.max_concurrent_requests
    least, wanted = requests + _OWN_DESCRIPTORS, _DESCRIPTORS_PER_REQUEST * requests + _OWN_DESCRIPTORS
    shown = "unlimited" if hard == resource.RLIM_INFINITY else f"{hard:,}"
    text = f"limit of open files {shown}, {wanted:,} wanted for max_concurrent_requests {requests}"
    remedy = f"raise it to {wanted} or more (`ulimit -Hn`, LimitNOFILE= of systemd, --ulimit nofile= of docker)"
    remedy += ", or lower max_concurrent_requests"
    if hard == resource.RLIM_INFINITY or hard >= wanted:
        yield ok("files", text)
    elif hard < least:
        yield error("files", f"{text}; connections are closed below {least:,}", remedy)
    else:
        yield warning("files", text, remedy)


def port(settings: Settings) -> Iterator[Finding]:
    """Yield whether the service's address can be bound."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((settings.host, settings.port))
        except OSError as failure:
            used = failure.errno == errno.EADDRINUSE
            reason = "another process listens there" if used else failure.strerror
            yield error("port", f"{settings.host}:{settings.port}: {reason}", "end that process, or set host or port")
            return
    yield ok("port", f"{settings.host}:{settings.port} is free")
