"""The short form of `fuzz_decoders.py`, and every file that it ever found."""

from __future__ import annotations

import pytest

from tests.audio.fuzz_decoders import DECODERS, FOUND, fault, faults
from tests.audio.isolation import isolated


@pytest.mark.parametrize("decoder", DECODERS)
def test_damaged_packets_neither_crash_nor_hang_a_decoder(decoder: str) -> None:
    """Sixty damaged files of each of the decoders that were allowed last keep every guarantee."""
    assert faults(decoder, range(60)) == {}


def test_files_that_were_once_at_fault_are_not_any_more() -> None:
    """Each file that the fuzzer has found keeps every guarantee."""
    for path in sorted(FOUND.glob("*")):
        assert isolated(fault, path.read_bytes()) == "", path.name
