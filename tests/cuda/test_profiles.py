"""Every profile through the CUDA build: configuration, model, memory, and faults that would show."""

from __future__ import annotations

import json
import re
import tomllib
from typing import TYPE_CHECKING, Any

import pytest

from tests.cuda.build import ROOT, CudaBuild
from tests.cuda.shape import IGNORED_WEIGHTS, THINKER_PARAMETERS, VISION_PARAMETERS, thinker_weights
from tests.cuda.table import CASES, GIB, Case, key, rendered

if TYPE_CHECKING:
    from collections.abc import Callable

PROFILES = ROOT / "deploy" / "profiles"
PAGE = ROOT / "deploy" / "cuda.md"
BUILT = [case for case in CASES if case.build]
CAPTIONER = [case for case in BUILT if case.profile != "cpu-embedded"]

pytestmark = pytest.mark.timeout(600)

WEIGHT_BYTES = {
    ("bfloat16", 1): 62_361_148_160,
    ("bfloat16", 2): 31_211_862_784,
    ("bfloat16", 4): 15_637_220_096,
    ("bfloat16", 8): 8_976_571_136,
    ("fp8_per_channel", 1): 32_464_149_248,
    ("fp8", 1): 32_553_606_752,
    ("fp8", 2): 16_333_454_944,
    ("int4", 1): 17_982_841_952,
    ("int4", 2): 9_022_735_456,
}
KV_BYTES = {1: 98_304, 2: 49_152, 4: 24_576, 8: 24_576}
"""Bytes of KV cache per token on each GPU. The four KV heads are copied from the eighth GPU on."""

CAPTION_TOKENS = 1000
LONGEST_AUDIO_TOKENS = 31_800


def test_every_profile_is_in_the_table() -> None:
    """Each file in deploy/profiles has a case, and each profile of the captioner one for 1, 2, 4 and 8 GPUs."""
    profiles = {path.stem for path in PROFILES.glob("*.toml")}
    expected = {(profile, count) for profile in profiles - {"cpu-embedded"} for count in (1, 2, 4, 8)}
    assert {(case.profile, case.tensor_parallel) for case in CASES} == expected | {("cpu-embedded", 1)}
    built = {(case.profile, case.tensor_parallel) for case in BUILT}
    for profile in profiles:
        assert (profile, tomllib.loads((PROFILES / f"{profile}.toml").read_text())["tensor_parallel"]) in built


@pytest.mark.parametrize("case", CASES, ids=key)
def test_a_profile_resolves(facts_of: Callable[[Case], dict[str, Any]], case: Case) -> None:
    """The configuration is the stated one: executor, scheduler, start method, graphs, budgets, model runner."""
    facts = facts_of(case)
    assert facts["platform_worker"] == "vllm.v1.worker.gpu_worker.Worker"
    assert facts["executor"] == ("InProcessExecutor" if case.tensor_parallel == 1 else "MultiGpuExecutor")
    assert facts["scheduler"] == "AsyncLongAudioScheduler"
    assert facts["async_scheduling"] is True
    assert facts["start_method"] == "spawn"
    assert (facts["graph_sizes"], facts["largest_graph"]) == case.graphs
    assert facts["graph_mode"] == "FULL_AND_PIECEWISE"
    assert facts["compile_mode"] == "VLLM_COMPILE"
    assert facts["step_tokens"] == case.step_tokens
    assert facts["encoder_tokens"] == case.encoder_tokens
    assert facts["profiled_frames"] == case.profiled_frames
    assert facts["model_runner"] == "V2"
    assert facts["unsupported_by_v2"] == []
    assert facts["prefix_caching"] is False
    assert facts["chunked_prefill"] is True
    assert facts["context"] == case.context
    assert facts["kv_dtype"] == case.kv_dtype


@pytest.mark.parametrize("case", CASES, ids=key)
def test_a_step_encodes_no_more_audio_than_was_profiled(facts_of: Callable[[Case], dict[str, Any]], case: Case) -> None:
    """The audio that vLLM encodes to measure memory is as long as a step may encode: 13 tokens a second."""
    facts = facts_of(case)
    assert facts["profiled_frames"] / 100 * 13 == facts["encoder_tokens"] <= facts["encoder_cache_tokens"]


@pytest.mark.parametrize("case", BUILT, ids=key)
def test_the_model_is_built_with_the_stated_kernels(facts_of: Callable[[Case], dict[str, Any]], case: Case) -> None:
    """Our class is built, with the attention and MoE backends of the table."""
    facts = facts_of(case)
    assert facts["class"] == "Thinker"
    assert facts["attention"] == [case.attention]
    assert facts["moe"] == [case.moe]


def test_the_size_of_the_model_is_the_published_one(
    cuda_build: CudaBuild, facts_of: Callable[[Case], dict[str, Any]]
) -> None:
    """Transformers' model of our sizes has the published number of parameters; vLLM's lacks only the vision tower."""
    assert THINKER_PARAMETERS == 31_719_205_488
    assert cuda_build.run("profiles:parameters", checkpoint=str(cuda_build.checkpoint)) == THINKER_PARAMETERS
    assert facts_of(CASES[0])["parameters"] == THINKER_PARAMETERS - VISION_PARAMETERS == 31_180_574_080


@pytest.mark.parametrize("case", [case for case in CASES if case.load], ids=key)
def test_every_published_weight_is_loaded(facts_of: Callable[[Case], dict[str, Any]], case: Case) -> None:
    """Weights under the names of the published index fill all 832 parameters; other parts are ignored."""
    facts = facts_of(case)
    assert facts["tensors"] == facts["filled"] == 832
    assert facts["unfilled"] == facts["unknown"] == []


def test_the_names_are_those_of_the_index() -> None:
    """The names that we load have exactly the forms that the thinker's part of the published index has."""
    forms = {re.sub(r"(?<=\.)\d+(?=\.)", "N", name) for name, _ in thinker_weights()}
    layer, tower = "thinker.model.layers.N", "thinker.audio_tower"
    both = ("weight", "bias")
    expected = {"thinker.lm_head.weight", "thinker.model.embed_tokens.weight", "thinker.model.norm.weight"}
    expected |= {f"{layer}.{name}.weight" for name in ("input_layernorm", "post_attention_layernorm", "mlp.gate")}
    expected |= {f"{layer}.self_attn.{name}_proj.weight" for name in "qkvo"}
    expected |= {f"{layer}.self_attn.{name}_norm.weight" for name in "qk"}
    expected |= {f"{layer}.mlp.experts.N.{name}_proj.weight" for name in ("gate", "up", "down")}
    expected |= {f"{tower}.{name}.{part}" for name in ("conv2d1", "conv2d2", "conv2d3") for part in both}
    expected |= {f"{tower}.{name}.{part}" for name in ("ln_post", "proj1", "proj2") for part in both}
    expected |= {f"{tower}.conv_out.weight"}
    expected |= {f"{tower}.layers.N.{name}.{part}" for name in ("fc1", "fc2") for part in both}
    expected |= {f"{tower}.layers.N.{name}_layer_norm.{part}" for name in ("final", "self_attn") for part in both}
    expected |= {f"{tower}.layers.N.self_attn.{name}_proj.{part}" for name in ("q", "k", "v", "out") for part in both}
    assert forms == expected
    assert len(expected) == 44
    assert sum(1 for _ in thinker_weights()) == 19_392
    assert not any(name.startswith(("thinker.model.", "thinker.audio_tower.")) for name in IGNORED_WEIGHTS)


@pytest.mark.parametrize("case", CAPTIONER, ids=key)
def test_only_attention_and_experts_are_quantized(facts_of: Callable[[Case], dict[str, Any]], case: Case) -> None:
    """FP8 covers 96 attention projections and 48 groups of experts; routers, tower, embeddings and head stay BF16."""
    methods = facts_of(case)["methods"]
    assert methods["UnquantizedEmbeddingMethod"] == {"embed_tokens": 1, "lm_head": 1}
    if case.checkpoint:
        experts = {"fp8": "CompressedTensorsW8A8Fp8MoEMethod", "int4": "CompressedTensorsWNA16MoEMethod"}
        assert methods["CompressedTensorsLinearMethod"] == {"qkv_proj": 48, "o_proj": 48}
        assert methods[experts[case.checkpoint]] == {"routed_experts": 48}
        assert methods["CompressedTensorsKVCacheMethod"] == {"attn": 48}
        assert methods["UnquantizedLinearMethod"] == {"audio_tower": 131, "gate": 48}
    elif "fp8" in case.profile:
        assert methods["Fp8PtpcOnlineLinearMethod"] == {"qkv_proj": 48, "o_proj": 48}
        assert methods["Fp8PtpcOnlineMoEMethod"] == {"routed_experts": 48}
        assert methods["UnquantizedLinearMethod"] == {"audio_tower": 131, "gate": 48}
    else:
        assert methods["UnquantizedLinearMethod"] == {"audio_tower": 131, "qkv_proj": 48, "o_proj": 48, "gate": 48}
        assert methods["UnquantizedFusedMoEMethod"] == {"routed_experts": 48}
    assert len(methods) == (5 if case.checkpoint else 4 if "fp8" in case.profile else 3)


@pytest.mark.parametrize("case", CAPTIONER, ids=key)
def test_weights_and_kv_cache_take_the_stated_memory(facts_of: Callable[[Case], dict[str, Any]], case: Case) -> None:
    """The bytes of weights and of KV cache on each GPU are the stated ones."""
    facts = facts_of(case)
    number_format = case.checkpoint or facts["quantization"] or facts["dtype"]
    stated = WEIGHT_BYTES.get((number_format, case.tensor_parallel))
    assert stated is None or facts["weight_bytes"] == stated
    assert facts["kv_bytes_per_token"] == KV_BYTES[case.tensor_parallel] // (2 if case.kv_dtype == "fp8" else 1)


@pytest.mark.parametrize("profile", sorted(path.stem for path in PROFILES.glob("*.toml") if path.stem[0].isdigit()))
def test_a_profiles_arithmetic_follows_from_the_model(facts_of: Callable[[Case], dict[str, Any]], profile: str) -> None:
    """The comment's weights, KV cache and room follow from the model that was built for the profile."""
    text = (PROFILES / f"{profile}.toml").read_text()
    settings = tomllib.loads(text)
    case = next(each for each in CASES if each[:1] == (profile,) and each[2] == settings["tensor_parallel"])
    facts = facts_of(case)

    def stated(pattern: str) -> float:
        found = re.search(pattern, text)
        assert found, pattern
        return float(found[1].replace(",", ""))

    weights = facts["weight_bytes"] / GIB
    cache = stated(r"of ([\d.]+) on the GPU") * settings["gpu_memory_utilization"] - weights
    cache -= stated(r"working memory ([\d.]+)")
    tokens = cache * GIB / facts["kv_bytes_per_token"]
    assert stated(r"weights ([\d.]+)") == pytest.approx(weights, abs=0.051)
    assert stated(r"KV cache ([\d.]+)") == pytest.approx(cache, abs=0.051)
    assert stated(r"= ([\d,]+) tokens") == pytest.approx(tokens, abs=1000)
    assert stated(r"Room for (\d+) inputs") == tokens // LONGEST_AUDIO_TOKENS
    assert stated(r"or (\d+) captions") == tokens // CAPTION_TOKENS
    assert tokens >= settings["max_num_seqs"] * CAPTION_TOKENS


def test_the_table_of_the_page_is_made_by_this_test(facts_of: Callable[[Case], dict[str, Any]]) -> None:
    """The table in deploy/cuda.md is what the CUDA build reports."""
    table = rendered(facts_of)
    assert table in PAGE.read_text(), f"put this table into {PAGE.relative_to(ROOT)}:\n{table}"


def test_flashinfer_changes_no_choice_of_kernels(cuda_build: CudaBuild) -> None:
    """With FlashInfer's kernels, which the official image has, attention and MoE use the same backends."""
    profiles = ("1xh100-80g", "1xh100-80g-fp8")
    cases = [{"profile": str(PROFILES / f"{profile}.toml"), "build": True} for profile in profiles]
    checkpoint = str(cuda_build.checkpoint)
    found = cuda_build.run("profiles", flashinfer=True, gpu="h100-80g", checkpoint=checkpoint, cases=cases)
    assert [(each["attention"], each["moe"]) for each in found] == [
        (["FLASH_ATTN"], ["TRITON"]),
        (["FLASH_ATTN"], ["VLLM_CUTLASS"]),
    ]


def test_planted_faults_show(cuda_build: CudaBuild) -> None:
    """A forked engine, routers in FP8, a lost weight and a budget that was not profiled each show in the facts."""
    fp8 = str(PROFILES / "1xh100-80g-fp8.toml")
    lost = "thinker.model.layers.7.mlp.gate.weight"
    cases = [
        {"profile": fp8, "fault": "fork"},
        {"profile": fp8, "fault": "budget"},
        {"profile": fp8, "fault": "router", "build": True},
        {"profile": str(PROFILES / "1xh100-80g.toml"), "build": True, "load": True, "lost": lost},
    ]
    fork, budget, router, missing = cuda_build.run(
        "profiles", gpu="h100-80g", checkpoint=str(cuda_build.checkpoint), cases=cases
    )
    assert fork["start_method"] == "fork"
    assert budget["profiled_frames"] == 30_000
    assert budget["encoder_tokens"] == 8190
    assert router["methods"]["Fp8PtpcOnlineLinearMethod"]["gate"] == 48
    assert missing["unfilled"] == ["language_model.model.layers.7.mlp.gate.weight"]


def test_the_lock_and_the_checkpoint_are_as_supposed(cuda_build: CudaBuild) -> None:
    """The build is the locked version, and the checkpoint directory has the captioner's sizes and no weights."""
    assert (cuda_build.site / "vllm-0.32.0.dist-info").is_dir()
    assert not list(cuda_build.checkpoint.glob("*.safetensors"))
    config = json.loads((cuda_build.checkpoint / "config.json").read_text())["thinker_config"]
    assert (config["text_config"]["num_hidden_layers"], config["audio_config"]["encoder_layers"]) == (48, 32)
