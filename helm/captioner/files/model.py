"""The checkpoint of an engine pod: fetch it from the hub, wait until it is whole, check its sums.

    python model.py fetch  DIRECTORY NAME REVISION    the download Job
    python model.py wait   DIRECTORY                  before an engine, on a volume that the Job fills
    python model.py verify DIRECTORY                  before an engine, on any other

The sums are those beside this script (SHA256SUMS, from `model.checksums`), and for what the hub keeps in its large-file
store also the hub's own. A marker that names the sums tells that a directory has been checked against them.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

GIVEN = Path(os.environ.get("CAPTIONER_MODEL_SUMS", Path(__file__).with_name("SHA256SUMS")))
MARKER = ".captioner-verified"
EVERY_S = 10


def given() -> dict[str, str]:
    """The operator's sums, by file name."""
    lines = [line.split(maxsplit=1) for line in GIVEN.read_text().splitlines() if line.strip()]
    return {name.strip().lstrip("*"): checksum.lower() for checksum, name in lines}


def digest(path: Path) -> str:
    """A file's SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def wrong(directory: Path, sums: dict[str, str]) -> list[str]:
    """What is missing or differs, in words."""
    missing = [name for name in sums if not (directory / name).is_file()]
    if not (directory / "config.json").is_file() and "config.json" not in missing:
        missing.append("config.json")
    there = [name for name in sums if name not in missing]
    with ThreadPoolExecutor(4) as pool:
        found = dict(zip(there, pool.map(lambda name: digest(directory / name), there), strict=True))
    bad = [f"{name} has {found[name]}, not {sums[name]}" for name in there if found[name] != sums[name]]
    return [f"{name} is missing" for name in missing] + bad


def mark() -> str:
    """What the marker of a directory checked against the operator's sums says."""
    return hashlib.sha256(repr(sorted(given().items())).encode()).hexdigest()


def fetch(directory: Path, name: str, revision: str) -> int:
    """Download one revision of a model, check it, and mark it as whole."""
    from huggingface_hub import HfApi, snapshot_download  # noqa: PLC0415 - only here, and slow

    marker = directory / MARKER
    wanted = f"{mark()} {name} {revision}\n"
    if marker.is_file() and marker.read_text() == wanted:
        print(f"{directory} is whole already")
        return 0
    marker.unlink(missing_ok=True)
    snapshot_download(name, revision=revision, local_dir=directory)
    files = HfApi().model_info(name, revision=revision, files_metadata=True).siblings
    sums = {each.rfilename: each.lfs.sha256 for each in files if each.lfs} | given()
    if problems := wrong(directory, sums):
        print("\n".join(problems), file=sys.stderr)
        for problem in problems:  # so that the next try fetches them anew
            (directory / problem.split()[0]).unlink(missing_ok=True)
        shutil.rmtree(directory / ".cache", ignore_errors=True)
        return 1
    marker.write_text(wanted)
    print(f"{directory} holds {name} at {revision}: {len(sums)} sums are right")
    return 0


def wait(directory: Path) -> int:
    """Return once the Job has marked the directory as checked against the sums of today."""
    marker = directory / MARKER
    while not (marker.is_file() and marker.read_text().startswith(mark())):
        print(f"waiting for {directory} to be whole", flush=True)
        time.sleep(EVERY_S)
    return 0


def verify(directory: Path) -> int:
    """Check the directory against the operator's sums."""
    problems = wrong(directory, given())
    print("\n".join(problems) or f"{directory}: {len(given())} sums are right", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    command, where, *rest = sys.argv[1:]
    sys.exit({"fetch": fetch, "wait": wait, "verify": verify}[command](Path(where), *rest))
