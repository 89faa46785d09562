"""One target under atheris, which guides the choice of inputs by the branches that they reach.

    python -m tests.hardening.guided openai CORPUS [options of libFuzzer]

Needs atheris, which is not among the tests' requirements: it has no build for every machine.
"""

from __future__ import annotations

import logging
import sys
from random import Random

import atheris

with atheris.instrument_imports(include=["serving", "python_multipart"]):
    from tests.hardening.mutation import mutated
    from tests.hardening.targets import TARGETS


def _mutated(data: bytes, max_size: int, seed: int) -> bytes:
    """Change an input: by its structure half of the time, else as libFuzzer does."""
    random = Random(seed)
    if random.random() < 0.5:
        return mutated(data, random)[:max_size]
    return bytes(atheris.Mutate(data, max_size))


def main() -> None:
    """Run the target named first, with libFuzzer's options after it."""
    logging.disable(logging.CRITICAL)
    target = TARGETS[sys.argv.pop(1)]
    atheris.Setup(sys.argv, target.check, custom_mutator=_mutated)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
