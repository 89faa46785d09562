"""Engine arguments that pass through to vLLM: checked by vLLM's own declarations, refused where we set them."""

from __future__ import annotations

import importlib
import os
import warnings
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import pytest

from serving.config import Settings
from serving.engine.vllm.engine import _environment
from serving.settings.engine_args import RESERVED, InvalidEngineArgs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]

TOKEN = "hunter2-hunter2"  # noqa: S105
KV_DTYPES = (
    "'auto', 'float16', 'bfloat16', 'fp8', 'fp8_e4m3', 'fp8_e5m2', 'fp8_inc', 'fp8_ds_mla', 'nvfp4_ds_mla', "
    "'turboquant_k8v4', 'turboquant_4bit_nc', 'turboquant_k3v4_nc', 'turboquant_3bit_nc', 'ultraquant_4bit', "
    "'int4_per_token_head', 'int8_per_token_head', 'fp8_per_token_head', 'nvfp4' or 'nvfp4_4over6'"
)


@pytest.fixture(scope="module")
def config_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """The product's configuration of vLLM with these engine arguments."""
    scratch: Path = tmp_path_factory.mktemp("engine-args")
    with _environment(Settings(), scratch), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = importlib.import_module("serving.engine.vllm.async_llm")

        def config_of(**arguments: Any) -> Any:
            return module.engine_config(Settings(engine_args=arguments))

        yield config_of


@pytest.mark.parametrize(
    ("arguments", "path", "expected"),
    [
        ({"kv_cache_dtype": "fp8"}, "cache_config.cache_dtype", "fp8"),
        ({"block_size": 64}, "cache_config.block_size", 64),
        ({"load_format": "dummy"}, "load_config.load_format", "dummy"),
        ({"model_loader_extra_config": {"concurrency": 16}, "load_format": "dummy"},
         "load_config.model_loader_extra_config", {"concurrency": 16}),
        ({"enable_expert_parallel": True}, "parallel_config.enable_expert_parallel", True),
        ({"attention_backend": "cpu_attn"}, "attention_config.backend.name", "CPU_ATTN"),
        ({"compilation_config": {"cache_dir": "compiled"}}, "compilation_config.cache_dir", "compiled"),
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}},
         "speculative_config.num_speculative_tokens", 2),
        ({"async_scheduling": False}, "scheduler_config.async_scheduling", False),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_an_argument_passes(config_of: Callable[..., Any], arguments: dict[str, Any], path: str, expected: Any) -> None:
    """The value is in vLLM's configuration; our scheduler, executor and budgets stay."""
    config = config_of(**arguments)
    found = config
    for part in path.split("."):
        found = getattr(found, part)
    assert found == expected
    assert config.scheduler_config.scheduler_cls.__name__ == "LongAudioScheduler"
    assert config.parallel_config.distributed_executor_backend.__name__ == "InProcessExecutor"
    assert config.scheduler_config.max_num_encoder_input_tokens == 1950
    assert config.cache_config.enable_prefix_caching is False


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"kv_cache_dtpe": "fp8"}, "kv_cache_dtpe: vLLM 0.32.0 has no such argument (did you mean kv_cache_dtype?)"),
        ({"kv-cache-dtype": "fp8"}, "kv-cache-dtype: vLLM 0.32.0 has no such argument (did you mean kv_cache_dtype?)"),
        ({"colour": "red"}, "colour: vLLM 0.32.0 has no such argument"),
        ({"kv_cache_dtype": "fp9"}, f"kv_cache_dtype: input should be {KV_DTYPES} (did you mean fp8?)"),
        ({"block_size": "x"}, "block_size: input should be a valid integer, unable to parse string as an integer"),
        ({"enable_expert_parallel": "perhaps"},
         "enable_expert_parallel: input should be a valid boolean, unable to interpret input"),
        ({"compilation_config": {"modes": 3}}, "compilation_config.modes: no such key (did you mean mode?)"),
        ({"compilation_config": 3},
         "compilation_config: input should be a dictionary or an instance of CompilationConfig"),
        ({"kv_transfer_config": {"kv_role": "kv_bot"}},
         "kv_transfer_config.kv_role: input should be 'kv_producer', 'kv_both' or 'kv_consumer'"),
        ({"attention_backend": "CPU_ATTN", "attention_config": {"backend": "CPU_ATTN"}},
         ("attention_backend, attention_config: vLLM refuses: attention_backend and attention_config.backend are "
          "mutually exclusive")),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_a_wrong_argument_is_named(config_of: Callable[..., Any], arguments: dict[str, Any], expected: str) -> None:
    """The message has the argument, what vLLM expects, and the nearest right name."""
    with pytest.raises(InvalidEngineArgs) as raised:
        config_of(**arguments)
    assert str(raised.value) == f"engine_args: {expected}"
    assert raised.value.__cause__ is None


def test_the_choices_of_an_enumeration_are_named(config_of: Callable[..., Any]) -> None:
    """Backends are named; vLLM itself names the import paths of the backends."""
    with pytest.raises(InvalidEngineArgs) as raised:
        config_of(attention_backend="flash_atn")
    message = str(raised.value)
    assert message.startswith("engine_args: attention_backend: must be one of FLASH_ATTN, FLASH_ATTN_DIFFKV, ")
    assert message.endswith(" (did you mean FLASH_ATTN?)")


@pytest.mark.parametrize(
    ("load_format", "expected"),
    [
        ("runai_streamer", "runai_streamer needs the package runai-model-streamer, which is not installed here"),
        ("fastsafetensors", "fastsafetensors needs the package fastsafetensors, which is not installed here"),
    ],
)
def test_a_load_format_without_its_package(config_of: Callable[..., Any], load_format: str, expected: str) -> None:
    """The start ends before a process is started, with the package's name."""
    with pytest.raises(InvalidEngineArgs) as raised:
        config_of(load_format=load_format)
    assert str(raised.value) == f"engine_args: load_format: {expected}"


def test_an_unknown_load_format(config_of: Callable[..., Any]) -> None:
    """The start names what vLLM notices only in the engine process."""
    with pytest.raises(
        InvalidEngineArgs, match=r"^engine_args: load_format: must be one of auto, .*safetenso"
    ) as raised:
        config_of(load_format="fastsafetensor")
    assert str(raised.value).endswith("(did you mean fastsafetensors?)")


@pytest.mark.parametrize(
    "arguments",
    [
        {"speculative_config": {"method": TOKEN, "num_speculative_tokens": 2, "api_token": TOKEN}},
        {"kv_transfer_config": {"kv_role": TOKEN}},
        {"kv_cache_dtype": TOKEN},
        {"compilation_config": {"mode": TOKEN}},
        {"hf_overrides": TOKEN},
    ],
    ids="-".join,
)
def test_no_value_is_shown(config_of: Callable[..., Any], arguments: dict[str, Any]) -> None:
    """The value of an argument may be a secret, also where it is in the wrong place."""
    with pytest.raises(InvalidEngineArgs) as raised:
        config_of(**arguments)
    assert TOKEN not in str(raised.value)
    assert str(raised.value).startswith(f"engine_args: {next(iter(arguments))}")


def test_a_revision_is_pinned(config_of: Callable[..., Any]) -> None:
    """Model and tokenizer are those of the revision."""
    module = importlib.import_module("serving.engine.vllm.async_llm")
    config = module.engine_config(Settings(revision="v1.0")).model_config
    assert (config.revision, config.tokenizer_revision) == ("v1.0", "v1.0")


def test_what_the_service_sets_is_reserved(config_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every argument that we pass is refused, except the default of `async_scheduling`; every refused one exists."""
    module = importlib.import_module("serving.engine.vllm.async_llm")
    passed: dict[str, Any] = {}
    real = module.AsyncEngineArgs

    def recorded(**arguments: Any) -> Any:
        passed.update(arguments)
        return real(**arguments)

    monkeypatch.setattr(module, "AsyncEngineArgs", recorded)
    config_of()
    assert passed.keys() - RESERVED.keys() == {"async_scheduling"}
    assert RESERVED.keys() <= {field.name for field in fields(real)}


@pytest.mark.parametrize(
    ("arguments", "offline"),
    [({}, "1"), ({"kv_cache_dtype": "fp8"}, "1"), ({"speculative_config": {"model": "org/draft"}}, None)],
)
def test_another_model_may_come_from_a_hub(
    arguments: dict[str, Any], offline: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model in a directory is loaded offline, unless an argument may name a second one."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with _environment(Settings(engine_args=arguments), tmp_path):
        assert os.environ.get("HF_HUB_OFFLINE") == offline
