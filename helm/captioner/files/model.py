"""Checkpoint of an engine pod: download from a hub, wait for the download, verify checksums.

    python model.py fetch  DIRECTORY NAME REVISION    for the download Job, or in an engine's pod
    python model.py wait   DIRECTORY                  before an engine, if the Job fills the volume
    python model.py verify DIRECTORY                  before an engine, otherwise

The sums are those of SHA256SUMS in this script's directory (from `model.checksums`) and the hub's: Hugging Face has
them of files in its large-file store, ModelScope (chosen by `VLLM_USE_MODELSCOPE`) of every file. A marker file that
names the sums records that a directory was checked against them.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

OPERATOR_SUMS = Path(os.environ.get("CAPTIONER_MODEL_SUMS", Path(__file__).with_name("SHA256SUMS")))
MARKER = ".captioner-verified"
LOCK = ".captioner-lock"
POLL_INTERVAL_S = 10


def operator_sums() -> dict[str, str]:
    """Return the operator's sums by file name."""
    lines = [line.split(maxsplit=1) for line in OPERATOR_SUMS.read_text().splitlines() if line.strip()]
    return {name.strip().lstrip("*"): checksum.lower() for checksum, name in lines}


def digest(path: Path) -> str:
    """Return a file's SHA-256 in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def problems_of(directory: Path, sums: dict[str, str]) -> list[str]:
    """Return a message for each file that is missing or has another sum."""
    missing = [name for name in sums if not (directory / name).is_file()]
    if not (directory / "config.json").is_file() and "config.json" not in missing:
        missing.append("config.json")
    present = [name for name in sums if name not in missing]
    with ThreadPoolExecutor(4) as pool:
        found = dict(zip(present, pool.map(lambda name: digest(directory / name), present), strict=True))
    bad = [f"{name} has {found[name]}, not {sums[name]}" for name in present if found[name] != sums[name]]
    return [f"{name} is missing" for name in missing] + bad


def sums_mark() -> str:
    """Return the marker text of a directory that was checked against the operator's sums."""
    return hashlib.sha256(repr(sorted(operator_sums().items())).encode()).hexdigest()


def uses_modelscope() -> bool:
    """Return whether the hub is ModelScope, by the variable and the values that vLLM reads."""
    return os.environ.get("VLLM_USE_MODELSCOPE", "").strip().lower() in {"1", "true"}


def download(directory: Path, name: str, revision: str) -> dict[str, str]:
    """Download one revision of a model; return the hub's sums by file name."""
    if uses_modelscope():
        from modelscope import snapshot_download as download_from_modelscope  # noqa: PLC0415 - only here, and slow
        from modelscope_hub import HubApi  # noqa: PLC0415

        # The default branch, which Hugging Face calls `main`.
        revision = "master" if revision == "main" else revision
        download_from_modelscope(name, revision=revision, local_dir=str(directory))
        files = HubApi().list_repo_files(name, "model", revision=revision)
        return {each.path: each.sha256 for each in files if each.sha256}
    from huggingface_hub import HfApi, snapshot_download  # noqa: PLC0415

    snapshot_download(name, revision=revision, local_dir=directory)
    files = HfApi().model_info(name, revision=revision, files_metadata=True).siblings
    return {each.rfilename: each.lfs.sha256 for each in files if each.lfs}


def fetch(directory: Path, name: str, revision: str) -> int:
    """Download one revision of a model, verify it, and write the marker. Return the exit status.

    Of several pods with one directory, as on one node, the first downloads and the others wait.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / LOCK).open("w") as lock:
        with suppress(OSError):  # some shared file systems have no locks; there a Job is alone
            fcntl.flock(lock, fcntl.LOCK_EX)
        return fetch_locked(directory, name, revision)


def fetch_locked(directory: Path, name: str, revision: str) -> int:
    """Download and verify as `fetch`, whose lock is held."""
    marker = directory / MARKER
    wanted = f"{sums_mark()} {name} {revision}{' of ModelScope' if uses_modelscope() else ''}\n"
    if marker.is_file() and marker.read_text() == wanted:
        print(f"{directory} is already complete")
        return 0
    marker.unlink(missing_ok=True)
    try:
        sums = download(directory, name, revision) | operator_sums()
    except ModuleNotFoundError as error:
        print(f"the package {error.name} is not in this image; use an image of the cuda variant", file=sys.stderr)
        return 1
    if uses_modelscope() and not sums:  # a release of its package that no longer reports them
        print("ModelScope has no sums for the files; set model.checksums", file=sys.stderr)
        return 1
    if problems := problems_of(directory, sums):
        print("\n".join(problems), file=sys.stderr)
        for problem in problems:  # the next attempt downloads these files again
            (directory / problem.split()[0]).unlink(missing_ok=True)
        for cache in (".cache", "._____temp"):
            shutil.rmtree(directory / cache, ignore_errors=True)
        return 1
    marker.write_text(wanted)
    print(f"{directory} contains {name} at {revision}: {len(sums)} sums match")
    return 0


def wait(directory: Path) -> int:
    """Wait until the Job has marked the directory as checked against the current sums."""
    marker = directory / MARKER
    while not (marker.is_file() and marker.read_text().startswith(sums_mark())):
        print(f"waiting until {directory} is complete", flush=True)
        time.sleep(POLL_INTERVAL_S)
    return 0


def verify(directory: Path) -> int:
    """Check the directory against the operator's sums. Return the exit status."""
    problems = problems_of(directory, operator_sums())
    print("\n".join(problems) or f"{directory}: {len(operator_sums())} sums match", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    command, where, *rest = sys.argv[1:]
    sys.exit({"fetch": fetch, "wait": wait, "verify": verify}[command](Path(where), *rest))
