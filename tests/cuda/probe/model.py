"""The captioner at full size on PyTorch's meta device: shapes without memory."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.distributed
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.cuda.shape import IGNORED_WEIGHTS, thinker_weights


class _Group:
    """The first of `size` processes of a group; only sizes and ranks count for shapes."""

    def __init__(self, size: int) -> None:
        self.world_size = size
        self.ranks = list(range(size))
        self.rank = self.rank_in_group = self.local_rank = self.first_rank = 0
        self.last_rank = size - 1
        self.is_first_rank = self.is_last_rank = True
        self.unique_name = "fake:0"
        self.device_communicator = None
        self.cpu_group = self.device_group = _ProcessGroup(size)


class _ProcessGroup:
    def __init__(self, size: int) -> None:
        self._size = size

    def size(self) -> int:
        return self._size

    def rank(self) -> int:
        return 0


def facts(config: Any, tensor_parallel: int, *, loads: bool, lost: str = "") -> dict[str, Any]:
    """Build the model of a configuration as the first of the GPUs does; return its facts.

    `loads`: load every weight by its published name, except the one called `lost`.
    """
    from vllm.config import set_current_vllm_config  # noqa: PLC0415 - vLLM reads the environment on import
    from vllm.model_executor.model_loader.utils import initialize_model  # noqa: PLC0415

    _pretend_groups(tensor_parallel)
    before = torch.get_default_dtype()
    torch.set_default_dtype(config.model_config.dtype)
    try:
        with set_current_vllm_config(config), torch.device("meta"):
            model = initialize_model(vllm_config=config, model_config=config.model_config)
            parameters = dict(model.named_parameters())
            found = {
                "class": type(model).__name__,
                "parameters": sum(each.numel() for each in parameters.values()),
                "tensors": len(parameters),
                "weight_bytes": _weight_bytes(model),
                "methods": _methods(model),
                "attention": sorted({each.attn_backend.get_name() for each in _attentions(model)}),
                "moe": sorted(_moe(model)),
                "kv_bytes_per_token": _kv_bytes_per_token(config, model),
            }
            if loads:
                found |= _loaded(model, parameters, lost)
    finally:
        torch.set_default_dtype(before)
    return found


def published_parameters(checkpoint: str) -> int:
    """Return the parameters of transformers' own model for the checkpoint directory, vision tower included."""
    from transformers import AutoConfig, Qwen3OmniMoeThinkerForConditionalGeneration  # noqa: PLC0415

    with torch.device("meta"):
        model = Qwen3OmniMoeThinkerForConditionalGeneration(AutoConfig.from_pretrained(checkpoint).thinker_config)
    return sum(each.numel() for each in model.parameters())


def _weight_bytes(model: torch.nn.Module) -> int:
    """Return the memory of the weights once loaded: FP8 takes one byte, and its scales next to nothing."""
    total = 0
    for module in model.modules():
        quantized = type(getattr(module, "quant_method", None)).__name__.startswith("Fp8")
        for parameter in module.parameters(recurse=False):
            total += parameter.numel() * (1 if quantized else parameter.element_size())
    return total


def _pretend_groups(size: int) -> None:
    import vllm.distributed.parallel_state as state  # noqa: PLC0415

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    torch.distributed.init_process_group(backend="fake", store=FakeStore(), rank=0, world_size=size)
    state._WORLD = state._TP = state._EP = _Group(size)
    state._PP = state._DP = state._DCP = state._PCP = state._INNER_DP_WORLD = _Group(1)
    state._NODE_COUNT = 1


def _methods(model: torch.nn.Module) -> dict[str, dict[str, int]]:
    """Return the number of modules of each kind by the class of their quantization method."""
    found: dict[str, Counter[str]] = {}
    for name, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        if method is not None:
            kind = name.rpartition(".")[2] if not name.startswith("audio_tower") else "audio_tower"
            found.setdefault(type(method).__name__, Counter())[kind] += 1
    return {method: dict(kinds) for method, kinds in found.items()}


def _attentions(model: torch.nn.Module) -> list[Any]:
    from vllm.model_executor.layers.attention import Attention  # noqa: PLC0415

    return [module for module in model.modules() if isinstance(module, Attention)]


def _moe(model: torch.nn.Module) -> set[str]:
    found = set()
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        for name in ("unquantized_backend", "fp8_backend", "mxfp4_backend", "wna16_backend", "backend"):
            backend = getattr(method, name, None)
            if backend is not None and "MoE" in type(method).__name__:
                found.add(getattr(backend, "value", str(backend)))
    return found


def _kv_bytes_per_token(config: Any, model: torch.nn.Module) -> int:
    total = 0
    for module in _attentions(model):
        spec = module.get_kv_cache_spec(config)
        total += spec.page_size_bytes // spec.block_size
    return total


def _loaded(model: Any, parameters: dict[str, Any], lost: str) -> dict[str, Any]:
    """Load every weight by its published name; return the parameters that no weight has filled."""

    def weights() -> Any:
        for name, shape in thinker_weights():
            if name != lost:
                yield name, torch.empty(*shape, dtype=torch.bfloat16, device="meta")
        for name in IGNORED_WEIGHTS:
            yield name, torch.empty(8, 8, dtype=torch.bfloat16, device="meta")

    loaded = set(model.load_weights(weights()))
    return {
        "filled": len(loaded & parameters.keys()),
        "unfilled": sorted(parameters.keys() - loaded),
        "unknown": sorted(loaded - parameters.keys()),
    }
