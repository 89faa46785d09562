"""Expected facts of each profile on 1, 2, 4 and 8 GPUs, as literals, and their table in deploy/cuda.md."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

GIB = 1 << 30
KIB = 1 << 10


class Case(NamedTuple):
    """A profile on a number of GPUs, and what is expected of it.

    `build` builds the model too, `load` also loads its weights by name. `graphs`: number and largest of the batch sizes
    with a CUDA graph. `checkpoint`: kind of the quantized checkpoint (`shape.QUANTIZED`), if the profile is for one.
    """

    profile: str
    gpu: str
    tensor_parallel: int
    graphs: tuple[int, int]
    step_tokens: int = 8192
    encoder_tokens: int = 8190
    profiled_frames: int = 63_000
    moe: str = "TRITON"
    attention: str = "FLASH_ATTN"
    build: bool = False
    load: bool = False
    checkpoint: str = ""
    context: int = 65_536
    kv_dtype: str = "auto"


def key(case: Case) -> str:
    """Return the name of a case in reports."""
    return f"{case.profile}-tp{case.tensor_parallel}"


_SMALL = {"step_tokens": 4096, "encoder_tokens": 3900, "profiled_frames": 30_000}
_EMBEDDED = {"step_tokens": 2048, "encoder_tokens": 1950, "profiled_frames": 15_000, "attention": "TRITON_ATTN"}
_FP8 = {**_SMALL, "checkpoint": "fp8"}
_INT4 = {
    "step_tokens": 2048,
    "encoder_tokens": 1950,
    "profiled_frames": 15_000,
    "checkpoint": "int4",
    "attention": "TRITON_ATTN",
    "moe": "MARLIN",
    "context": 40_960,
    "kv_dtype": "fp8",
}

CASES = (
    Case("1xh100-80g", "h100-80g", 1, (27, 192), build=True, load=True),
    Case("1xh100-80g", "h100-80g", 2, (27, 192), build=True, load=True),
    Case("1xh100-80g", "h100-80g", 4, (27, 192), build=True),
    Case("1xh100-80g", "h100-80g", 8, (27, 192), build=True, load=True),
    Case("1xh100-80g-fp8", "h100-80g", 1, (51, 512), moe="VLLM_CUTLASS", build=True),
    Case("1xh100-80g-fp8", "h100-80g", 2, (51, 512), moe="VLLM_CUTLASS", build=True),
    Case("1xh100-80g-fp8", "h100-80g", 4, (51, 512), moe="VLLM_CUTLASS", build=True),
    Case("1xh100-80g-fp8", "h100-80g", 8, (51, 512), moe="VLLM_CUTLASS", build=True),
    Case("2xa100-80g", "a100-80g", 1, (51, 512)),
    Case("2xa100-80g", "a100-80g", 2, (51, 512), build=True),
    Case("2xa100-80g", "a100-80g", 4, (51, 512)),
    Case("2xa100-80g", "a100-80g", 8, (51, 512)),
    Case("4xl40s", "l40s", 1, (51, 512), **_SMALL),  # type: ignore[arg-type]
    Case("4xl40s", "l40s", 2, (51, 512), **_SMALL),  # type: ignore[arg-type]
    Case("4xl40s", "l40s", 4, (51, 512), build=True, **_SMALL),  # type: ignore[arg-type]
    Case("4xl40s", "l40s", 8, (51, 512), **_SMALL),  # type: ignore[arg-type]
    Case("8xh100-80g", "h100-80g", 1, (51, 512)),
    Case("8xh100-80g", "h100-80g", 2, (51, 512), build=True),
    Case("8xh100-80g", "h100-80g", 4, (51, 512)),
    Case("8xh100-80g", "h100-80g", 8, (51, 512)),
    Case("1xl40s-fp8", "l40s", 1, (19, 128), build=True, **_FP8),  # type: ignore[arg-type]
    Case("1xl40s-fp8", "l40s", 2, (19, 128), build=True, **_FP8),  # type: ignore[arg-type]
    Case("1xl40s-fp8", "l40s", 4, (19, 128), **_FP8),  # type: ignore[arg-type]
    Case("1xl40s-fp8", "l40s", 8, (19, 128), **_FP8),  # type: ignore[arg-type]
    Case("1xl4-int4", "l4", 1, (11, 64), build=True, **_INT4),  # type: ignore[arg-type]
    Case("1xl4-int4", "l4", 2, (11, 64), build=True, **_INT4),  # type: ignore[arg-type]
    Case("1xl4-int4", "l4", 4, (11, 64), **_INT4),  # type: ignore[arg-type]
    Case("1xl4-int4", "l4", 8, (11, 64), **_INT4),  # type: ignore[arg-type]
    Case("cpu-embedded", "h100-80g", 1, (19, 128), build=True, **_EMBEDDED),  # type: ignore[arg-type]
)
"""Every profile at 1, 2, 4 and 8 GPUs; the stand-in, whose attention heads cannot be divided by 8, on one."""

_HEADS = (
    "Profile",
    "GPUs per engine",
    "Executor",
    "CUDA graphs (largest)",
    "Tokens per step",
    "Audio tokens encoded per step",
    "Attention",
    "MoE",
    "Weights, GiB per GPU",
    "KV cache, KiB per token and GPU",
)


def rendered(facts_of: Callable[[Case], dict[str, Any]]) -> str:
    """Return the table in Markdown; `-` where the model was not built."""
    rows = [_HEADS, tuple("---" for _ in _HEADS)]
    for case in CASES:
        facts = facts_of(case)
        row = [case.profile, str(case.tensor_parallel), f"`{facts['executor']}`"]
        row += [f"{facts['graph_sizes']} ({facts['largest_graph']})", f"{facts['step_tokens']:,}"]
        row += [f"{facts['encoder_tokens']:,}"]
        if case.build:
            weights = facts["weight_bytes"] / GIB
            row += [f"`{each}`" for each in (*facts["attention"], *facts["moe"])]
            row += [f"{weights:.2f}" if weights < 1 else f"{weights:.1f}", f"{facts['kv_bytes_per_token'] / KIB:g}"]
        else:
            row += ["-"] * 4
        rows.append(tuple(row))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)
