"""Arithmetic of GPU memory: the tokens of KV cache that a choice of GPUs leaves, and the profile that fits.

Weights and KV cache are those of the captioner as `tests/cuda` builds it (the table in deploy/cuda.md); working memory
is the profiles' estimate. tests/cli/test_doctor_fit.py compares these figures with the page and with deploy/profiles.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from serving.cli.doctor.findings import Finding, error, ok, warning
from serving.cli.doctor.gpu import Gpu, NoGpuError, visible_gpus

if TYPE_CHECKING:
    from collections.abc import Iterator

    from serving.config import Settings

GIB = 1 << 30
KIB = 1 << 10

WEIGHTS_GIB = {
    "BF16": {1: 58.1, 2: 29.1, 4: 14.6, 8: 8.4},
    "FP8": {1: 30.2, 2: 15.1, 4: 7.6, 8: 4.9},
    "FP8 checkpoint": {1: 30.3, 2: 15.2},
    "INT4 checkpoint": {1: 16.7, 2: 8.4},
}
"""Weights on each GPU, by number format and GPUs per engine. `FP8` is made while loading; a quantized checkpoint has
its own scales."""

KV_KIB = {1: 96, 2: 48, 4: 24, 8: 24}
"""KV cache per token on each GPU; each of the four KV heads is copied from the eighth GPU on. In FP8 it is half."""

CHECKPOINT_GIB = 59.1
"""The captioner's files at the hub: 31.7 B parameters in BF16."""

_WORKING_GIB = 4.0
_WORKING_BY_STEP = ((2048, 2.0), (4096, 3.0))
"""Working memory for engine steps of up to that number of tokens; above, it is `_WORKING_GIB`."""
_LAYERS, _HIDDEN = 48, 2048


class Profile(NamedTuple):
    """A file of deploy/profiles. Memory of each GPU and working memory in GiB."""

    name: str
    gpus: int
    tensor_parallel: int
    gpu_gib: float
    utilization: float
    number_format: str = "BF16"
    working_gib: float = _WORKING_GIB
    fp8_cache: bool = False

    @property
    def fit(self) -> Fit:
        """The division of the memory of the profile's own GPU."""
        return self.on(self.gpu_gib)

    def on(self, gpu_gib: float) -> Fit:
        """Return the division of the memory of a GPU."""
        weights = WEIGHTS_GIB[self.number_format][self.tensor_parallel]
        return fit(gpu_gib, self.utilization, weights, self.tensor_parallel, self.working_gib, fp8_cache=self.fp8_cache)


PROFILES = (
    Profile("8xh100-80g", 8, 2, 79.1, 0.92),
    Profile("4xl40s", 4, 4, 44.4, 0.9, working_gib=3.0),
    Profile("2xa100-80g", 2, 2, 79.1, 0.92),
    Profile("1xh100-80g", 1, 1, 79.1, 0.92),
    Profile("1xh100-80g-fp8", 1, 1, 79.1, 0.92, number_format="FP8"),
    Profile("1xl40s-fp8", 1, 1, 44.4, 0.9, number_format="FP8 checkpoint", working_gib=3.0),
    Profile("1xl4-int4", 1, 1, 22.0, 0.95, number_format="INT4 checkpoint", working_gib=2.0, fp8_cache=True),
)
"""In the order in which they are tried."""


class Fit(NamedTuple):
    """Memory of one GPU of an engine, in GiB, and the tokens of KV cache that the engine holds."""

    taken_gib: float
    weights_gib: float
    working_gib: float
    kv_gib: float
    tokens: int

    def __str__(self) -> str:
        rest = "KV cache" if self.kv_gib >= 0 else "missing"
        text = (
            f"{self.taken_gib:.1f} GiB of each GPU - weights {self.weights_gib:.1f} - working memory "
            f"{self.working_gib:.1f} (estimate) = {rest} {abs(self.kv_gib):.1f} GiB"
        )
        return f"{text} = {self.tokens:,} tokens" if self.tokens else text


def fit(
    gpu_gib: float,
    utilization: float,
    weights_gib: float,
    tensor_parallel: int,
    working_gib: float,
    *,
    fp8_cache: bool = False,
) -> Fit:
    """Return the division of a GPU's memory."""
    taken = gpu_gib * utilization
    kv_gib = taken - weights_gib - working_gib
    token_bytes = KV_KIB[tensor_parallel] * KIB / (2 if fp8_cache else 1)
    tokens = int(kv_gib * GIB / token_bytes / 1000) * 1000
    return Fit(taken, weights_gib, working_gib, kv_gib, max(0, tokens))


_QUANTIZED = ("awq", "gptq", "int4", "int8", "w4a16", "w8a8", "fp8", "nvfp4", "gguf")
"""Words in names of checkpoints whose weights are quantized already, and so smaller than `WEIGHTS_GIB`."""


def is_captioner(model: str) -> bool:
    """Return whether `model`, a directory or a name at a hub, has the sizes of the captioner in BF16."""
    if not Path(model).is_dir():
        name = model.lower()
        return "qwen3-omni-30b-a3b" in name and not any(word in name for word in _QUANTIZED)
    try:
        config = json.loads(Path(model, "config.json").read_text())
        text = config["thinker_config"]["text_config"]
        quantized = "quantization_config" in {*config, *config["thinker_config"], *text}
    except (OSError, ValueError, LookupError, TypeError):
        return False
    sizes = text.get("hidden_size") == _HIDDEN and text.get("num_hidden_layers") == _LAYERS
    return bool(sizes and not quantized)


def number_format_of(settings: Settings) -> str:
    """Return the key of `WEIGHTS_GIB` for the settings: by the checkpoint in a directory, else by the model's name."""
    if settings.quantization:
        return "FP8"
    try:
        method = json.loads(Path(settings.model, "config.json").read_text())["quantization_config"]
        bits = {group["weights"]["num_bits"] for group in method["config_groups"].values()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        name = Path(settings.model).name.lower()
        if any(word in name for word in ("int4", "awq", "gptq", "w4a16")):
            return "INT4 checkpoint"
        return "FP8 checkpoint" if "fp8" in name else "BF16"
    return {8: "FP8 checkpoint", 4: "INT4 checkpoint"}.get(max(bits, default=0), "BF16")


def fp8_cache_of(settings: Settings) -> bool:
    """Return whether the KV cache is in FP8."""
    return str(settings.engine_args.get("kv_cache_dtype", "")).startswith("fp8")


def fitting_profile(gpus: list[Gpu]) -> Profile | None:
    """Return the first profile for which there are enough GPUs with enough memory."""
    for profile in PROFILES:
        large = [gpu for gpu in gpus if gpu.total_gib >= profile.gpu_gib]
        if len(large) >= profile.gpus and ("FP8" not in profile.number_format or all(gpu.has_fp8 for gpu in large)):
            return profile
    return None


def probe(settings: Settings) -> Iterator[Finding]:
    """Yield whether the model and its context fit the GPUs, and which profile does."""
    try:
        gpus = visible_gpus()
    except NoGpuError:
        return
    if (known := fitting_profile(gpus)) is not None:
        needs = f", with an {known.number_format}" if "checkpoint" in known.number_format else ""
        shown = known.on(min(gpu.total_gib for gpu in gpus))
        yield ok("profile", f"deploy/profiles/{known.name}.toml fits{needs}: {shown}")
    elif any(gpu.total_gib for gpu in gpus):
        least = {profile.gpus: profile.gpu_gib for profile in PROFILES}
        yield warning(
            "profile",
            f"no profile of deploy/profiles fits {len(gpus)} x {min(gpu.total_gib for gpu in gpus):.1f} GiB",
            "use "
            + ", or ".join(f"{count} GPUs of {size:g} GiB" for count, size in sorted(least.items()))
            + ", or set tensor_parallel, quantization and max_model_len by the arithmetic of `memory`",
        )
    yield from _memory(settings, gpus)


def _memory(settings: Settings, gpus: list[Gpu]) -> Iterator[Finding]:
    count, gib = settings.tensor_parallel, min(gpu.total_gib for gpu in gpus[: settings.tensor_parallel])
    if settings.is_embedded:
        yield ok("memory", "the embedded stand-in needs less than 1 GiB for its weights")
        return
    if not is_captioner(settings.model) or count not in KV_KIB or not gib:
        message = f"memory was not calculated: {settings.model} is not known, or the GPUs do not report their memory"
        yield warning("memory", message, "compare the checkpoint's size with the GPUs' memory")
        return
    number_format, fp8_cache = number_format_of(settings), fp8_cache_of(settings)
    if count not in WEIGHTS_GIB[number_format]:
        message = f"memory was not calculated: an {number_format} over {count} GPUs is not known"
        yield warning("memory", message, "set tensor_parallel to 1 or 2")
        return
    weights = WEIGHTS_GIB[number_format][count]
    working_gib = next((each for tokens, each in _WORKING_BY_STEP if settings.step_tokens <= tokens), _WORKING_GIB)
    shown = fit(gib, settings.gpu_memory_utilization, weights, count, working_gib, fp8_cache=fp8_cache)
    context_gib = settings.max_model_len * KV_KIB[count] * KIB / GIB / (2 if fp8_cache else 1)
    text = f"{count} x {gib:.1f} GiB, {number_format}: {shown}"
    if shown.kv_gib + shown.working_gib < context_gib:
        yield error(
            "memory",
            f"{text}; one context of max_model_len {settings.max_model_len:,} needs {context_gib:.1f}",
            _larger(settings, gpus),
        )
    elif shown.kv_gib < context_gib:
        message = f"{text}; one context of max_model_len {settings.max_model_len:,} needs {context_gib:.1f}: tight"
        yield warning("memory", message, _larger(settings, gpus))
    else:
        yield ok("memory", text)


def _larger(settings: Settings, gpus: list[Gpu]) -> str:
    """Return the choices that would fit, of those that this machine allows first."""
    gib = min(gpu.total_gib for gpu in gpus)
    choices = []
    for number_format, weights in WEIGHTS_GIB.items():
        for count, each in weights.items():
            if "checkpoint" in number_format or (number_format == "FP8" and not all(gpu.has_fp8 for gpu in gpus)):
                continue
            found = fit(gib, settings.gpu_memory_utilization, each, count, _WORKING_GIB)
            if found.tokens >= settings.max_model_len:
                choices.append((count > len(gpus), count, number_format))
    if not choices:
        return "use GPUs with 48 GiB or more, a quantized checkpoint (deploy/cuda.md), or lower max_model_len"
    lacking, count, number_format = min(choices)
    quantization = "" if number_format == "BF16" else " and quantization fp8_per_channel"
    where = f"use {count} such GPUs" if lacking else "this machine can"
    return f"{where}: set tensor_parallel to {count}{quantization}"
