"""Profiles resolved, and their models built, for one kind of GPU; faults planted on request."""

from __future__ import annotations

import os
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from serving.engine.vllm.engine import _environment
from tests.cuda.probe import configuration, model

if TYPE_CHECKING:
    from serving.config import Settings

_METHOD = "VLLM_WORKER_MULTIPROC_METHOD"


def run(gpu: str, checkpoint: str, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the facts of each case.

    A case has a `profile`, the `checkpoint` that it is for if that is another one, settings that replace the profile's
    (`changes`), `build` to build the model too, `load` to load its weights by name, all but `lost`, and `fault` for a
    planted one: `fork`, `router` or `budget`.
    """
    with tempfile.TemporaryDirectory() as scratch:
        found = []
        for case in cases:
            directory = case.get("checkpoint") or checkpoint
            settings = configuration.settings_of(case["profile"], directory, **case.get("changes", {}))
            with _environment(settings, Path(scratch)):
                found.append(_facts(settings, gpu, case))
    return found


def parameters(checkpoint: str) -> int:
    """See `model.published_parameters`."""
    return model.published_parameters(checkpoint)


def _facts(settings: Settings, gpu: str, case: dict[str, Any]) -> dict[str, Any]:
    from tests.cuda.probe.gpu import pretend  # noqa: PLC0415 - vLLM reads the environment on import

    pretend(gpu)
    from vllm.model_executor.models.qwen3_omni_moe_thinker import (  # noqa: PLC0415
        Qwen3OmniMoeThinkerProcessingInfo as VllmsInfo,
    )
    from vllm.utils.system_utils import get_mp_context  # noqa: PLC0415

    from serving.engine.vllm import async_llm  # noqa: PLC0415
    from serving.engine.vllm.model import ProcessingInfo  # noqa: PLC0415

    with ExitStack() as stack:
        match case.get("fault"):
            case "fork":
                os.environ.pop(_METHOD)
                stack.callback(os.environ.__setitem__, _METHOD, "spawn")
            case "router":
                stack.enter_context(patch.object(async_llm, "UNQUANTIZED", ()))
            case "budget":
                vllms = VllmsInfo.get_mm_max_tokens_per_item
                stack.enter_context(patch.object(ProcessingInfo, "get_mm_max_tokens_per_item", vllms))
        config = async_llm.engine_config(settings)
        found = configuration.facts(config) | {"start_method": get_mp_context().get_start_method()}
        if case.get("build"):
            loads, lost = case.get("load", False), case.get("lost", "")
            found |= model.facts(config, settings.tensor_parallel, loads=loads, lost=lost)
    return found
