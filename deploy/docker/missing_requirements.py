"""Locked requirements that an image must install: those that its base lacks, without those it never needs.

    missing_requirements.py LOCK [--base] [--without NAME,NAME] > requirements.txt

With `--base`, run this with the base image's Python. Packages that it has in the locked version are left out. Packages
of the engine (`ENGINE`) are always left out, because they were built for each other; but versions of those in `SAME`
must equal the locked ones, or the program fails. Any other package is installed as locked, and imported before the
base's. Standard library only.
"""

from __future__ import annotations

import argparse
import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

SAME = ("vllm", "torch")
ENGINE = re.compile(
    r"vllm|torch(vision|audio|codec|-c-dlpack-ext)?|triton|(nvidia|cuda|flashinfer|nccl|tokenspeed)-.*|nccl4py|nvtx"
    r"|tilelang|humming-kernels|quack-kernels|apache-tvm-ffi|pynvvideocodec|fastsafetensors|instanttensor|z3-solver"
)


def main() -> None:
    """Print the requirements; print the counts on standard error."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("lock", type=Path)
    arguments.add_argument("--base", action="store_true")
    arguments.add_argument("--without", default="", type=lambda text: {name for name in text.split(",") if name})
    given = arguments.parse_args()

    needed, left_out, unknown = [], [], set(given.without)
    for name, wanted, requirement in locked(given.lock.read_text()):
        if name in given.without:
            unknown.discard(name)
            left_out.append(name)
        elif given.base and not is_needed(name, wanted):
            left_out.append(name)
        else:
            needed.append(requirement)
    if unknown:
        sys.exit(f"not in {given.lock}: {', '.join(sorted(unknown))}")
    print(*needed, sep="\n")
    print(f"{len(left_out)} left out, {len(needed)} to install", file=sys.stderr)


def locked(text: str) -> Iterator[tuple[str, str, str]]:
    """Yield each requirement's name, its version, and all its lines."""
    for requirement in re.split(r"\n(?=\S)", text.strip()):
        name, _, rest = requirement.partition("==")
        yield name, rest.split(maxsplit=1)[0], requirement


def is_needed(name: str, wanted: str) -> bool:
    """Return whether a package must be installed. Exit if the base has another version of the engine than `wanted`."""
    try:
        has = version(name).partition("+")[0]  # `2.13.0+cu130` is 2.13.0 built for a CUDA version
    except PackageNotFoundError:
        has = None
    if name in SAME and has != wanted:
        sys.exit(f"the base image has {name} {has}, but {wanted} is locked and tested; use a base with {name} {wanted}")
    return has != wanted and not ENGINE.fullmatch(name)


if __name__ == "__main__":
    main()
