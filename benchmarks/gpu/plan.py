"""Options of a run, and what follows from them for every system: model, limits, GPUs, clips."""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.compare.systems import Setup
from benchmarks.gpu.machine import gpus
from benchmarks.program import CHECKPOINT, ROOT, option_parser

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping, Sequence

LENGTHS_S = (5, 30, 2400)
"""Lengths of the clips of the parity step, in seconds."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Model, settings and amount of work of a run."""

    model: str
    out: Path
    profile: dict[str, Any] = field(default_factory=dict)
    """Settings of a file of deploy/profiles; those named here override nothing else."""
    load_format: str = "auto"
    gpus: int = 0
    small: bool = False
    lengths_s: tuple[int, ...] = LENGTHS_S
    tokens: int = 200
    """Most tokens of a greedy caption."""
    burst: int = 32
    requests: int = 64
    rounds: int = 3
    concurrency: int = 32
    dollars_per_gpu_hour: float | None = None
    service_flags: tuple[str, ...] = ()
    step_timeout_s: int = 3600

    @property
    def tensor_parallel(self) -> int:
        """GPUs of one engine."""
        return int(self.profile.get("tensor_parallel", 1))

    @property
    def setup(self) -> Setup:
        """Settings that the service and `vllm serve` share."""
        return Setup(
            Path(self.model),
            self.tokens,
            int(self.profile.get("max_num_seqs", 16 if self.small else 96)),
            int(self.profile.get("max_num_batched_tokens", 2048 if self.small else 8192)),
            dtype=self.profile.get("dtype", "float32" if self.small else "bfloat16"),
            enforce_eager=not self.gpus,
        )

    def flags(self, tensor_parallel: int = 0, **settings: Any) -> list[str]:
        """Return the service's further flags: the profile's settings, these, and those of the run."""
        own = {
            name: value
            for name, value in self.profile.items()
            if name not in {"model", "dtype", "max_num_seqs", "max_num_batched_tokens", "engine_args"}
        }
        own |= {"tensor_parallel": tensor_parallel or self.tensor_parallel, "fetch_allow": "127.0.0.0/8", **settings}
        return [*_flags(own), *self.service_flags]

    def vllm_flags(self, tensor_parallel: int = 0, **arguments: Any) -> list[str]:
        """Return further flags of `vllm serve`, which correspond to the profile's settings."""
        own: dict[str, Any] = {"tensor_parallel_size": tensor_parallel or self.tensor_parallel}
        own |= {name: self.profile[name] for name in ("gpu_memory_utilization", "quantization") if name in self.profile}
        own |= self.engine_args | arguments
        return _flags(own)

    @property
    def long_steps(self) -> dict[str, int]:
        """Argument by which `vllm serve` admits the longest clip: it encodes one in one step, 13 tokens a second."""
        least = 13 * max(self.lengths_s) + 64
        return {"max_num_batched_tokens": max(self.setup.max_num_batched_tokens, 1 << (least - 1).bit_length())}

    @property
    def engine_args(self) -> dict[str, Any]:
        """Arguments of vLLM that the service gets as `engine_args`."""
        given = dict(self.profile.get("engine_args", {}))
        return given | ({"load_format": self.load_format} if self.load_format != "auto" else {})


def _flags(values: Mapping[str, Any]) -> list[str]:
    """Return flags of these values; None leaves one out."""
    return [f"--{name.replace('_', '-')}={_text(value)}" for name, value in values.items() if value is not None]


def _text(value: Any) -> str:
    return json.dumps(value) if isinstance(value, bool | dict | list) else str(value)


def plan_of(argv: Sequence[str] | None, steps: Sequence[str], doc: str | None) -> tuple[Plan, argparse.Namespace]:
    """Parse the command line; return the plan, and the options that choose steps."""
    parser = option_parser(doc)
    parser.add_argument("--model", help="directory, or name at the hub; default: the profile's")
    parser.add_argument("--profile", type=Path, help="file of deploy/profiles with the settings for these GPUs")
    parser.add_argument("--load-format", default="auto", help="`dummy` needs no weights: random ones, without sense")
    parser.add_argument("--price", type=float, help="dollars per GPU and hour, for the cost of an hour of audio")
    parser.add_argument("--small", action="store_true", help="the embedded stand-in, and little work")
    parser.add_argument("--lengths", type=int, nargs="+", help="seconds of the clips of the parity step")
    parser.add_argument("--tokens", type=int, help="most tokens of a greedy caption")
    parser.add_argument("--burst", type=int, help="requests at the same time of the memory step")
    parser.add_argument("--requests", type=int, help="requests of a round of the throughput step")
    parser.add_argument("--rounds", type=int, help="rounds of the throughput step")
    parser.add_argument("--concurrency", type=int, help="requests at a time of the throughput step")
    parser.add_argument("--step-timeout", type=int, help="seconds that a step may take")
    parser.add_argument("--service-flags", nargs="+", default=[], help="further flags of the service, without `--`")
    parser.add_argument("--only", nargs="+", choices=steps, default=list(steps), help="only these steps")
    parser.add_argument("--again", nargs="+", choices=steps, default=[], help="repeat these steps")
    parser.add_argument("--out", type=Path, default=ROOT / ".cache" / "first-hour", help="directory of the report")
    options = parser.parse_args(argv)
    profile = tomllib.loads(options.profile.read_text()) if options.profile else {}
    model = options.model or profile.get("model") or (str(CHECKPOINT) if options.small else "")
    if not model:
        parser.error("--model, a --profile with a model, or --small is required")
    given: dict[str, Any] = {
        "tokens": options.tokens or (24 if options.small else None),
        "burst": options.burst or (8 if options.small else None),
        "requests": options.requests or (16 if options.small else None),
        "rounds": options.rounds or (1 if options.small else None),
        "concurrency": options.concurrency or (8 if options.small else None),
        "step_timeout_s": options.step_timeout or (900 if options.small else None),
        "lengths_s": tuple(options.lengths) if options.lengths else None,
    }
    return Plan(
        model,
        options.out,
        profile,
        options.load_format,
        len(gpus()),
        options.small,
        dollars_per_gpu_hour=options.price,
        service_flags=tuple(f"--{flag}" for flag in options.service_flags),
        **{name: value for name, value in given.items() if value is not None},
    ), options
