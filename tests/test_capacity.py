"""deploy/capacity.md: its table and its example follow from the profiles by the formulas that it states."""

from __future__ import annotations

import math
import re
import tomllib

from tests.support.language import ROOT

TEXT = (ROOT / "deploy" / "capacity.md").read_text()
BANDWIDTH = {"h100": 3350, "a100": 2039, "l40s": 864, "l4": 300}
"""GB/s, by NVIDIA's data sheets."""


def expected(name: str) -> str:
    """Return the row of a profile, from its comments and settings."""
    text = (ROOT / "deploy" / "profiles" / f"{name}.toml").read_text()
    settings = tomllib.loads(text)
    weights = re.search(r"^#   weights ([\d.]+) ", text, re.MULTILINE)
    cache = re.search(r"^#   KV cache [\d.]+  = ([\d,]+) tokens of (\d+) KiB$", text, re.MULTILINE)
    gpu = re.search(r"x(h100|a100|l40s|l4)", name)
    assert weights
    assert cache
    assert gpu
    gpus, bandwidth = settings["tensor_parallel"], BANDWIDTH[gpu[1]]
    captions = min(settings["max_num_seqs"], int(cache[1].replace(",", "")) // 1000)
    read_gb = (float(weights[1]) * 2**30 + captions * 700 * int(cache[2]) * 1024) / 1e9
    tokens = captions / (read_gb / bandwidth)
    hours = tokens / 600 * 30 * 24
    return (
        f"| {name} | {gpus} | {bandwidth:,} | {captions} | {read_gb:.1f} | {1000 * read_gb / bandwidth:.1f} "
        f"| {tokens:,.0f} | {round(hours, -1):,.0f} | {round(hours / gpus / 2, -1):,.0f} |"
    )


def test_each_profile_has_its_row() -> None:
    """The table has every profile of GPUs, with the figures that the formulas give."""
    names = {path.stem for path in (ROOT / "deploy" / "profiles").glob("*.toml")} - {"cpu-embedded"}
    rows = {row.split(" | ")[0].removeprefix("| "): row for row in re.findall(r"^\| \d+x.*$", TEXT, re.MULTILINE)}
    assert rows == {name: expected(name) for name in names}


def test_one_row_by_hand() -> None:
    """One H100 in BF16: 96 captions; 62.39 GB of weights and 6.61 GB of KV cache in 20.6 ms."""
    assert expected("1xh100-80g") == "| 1xh100-80g | 1 | 3,350 | 96 | 69.0 | 20.6 | 4,662 | 5,590 | 2,800 |"


def test_the_example_follows() -> None:
    """The example's engines, requests and bytes are those of its formulas."""
    assert math.ceil(10_000 * 2.4 / (15_640 * 0.5 * 0.7)) == 5
    assert "= ceil(4.38) = 5, on 10 GPUs" in TEXT
    assert 10_000 * 3600 / 30 == 1_200_000
    assert "0.67 GB a day" in TEXT
    assert round(1_200_000 * 555 / 1e9, 2) == 0.67
    assert round(30_000 * 8 * 1170 / 1e6) == 281
    assert round(0.1 * 1_200_000 / 86_400 * 176_400 * 0.48 / 1000) == 118


def test_it_says_that_nothing_was_tried() -> None:
    """The page begins with what its figures are."""
    assert "**Calculated, untried**" in TEXT.partition("\n## ")[0]
