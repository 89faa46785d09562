"""Profiles per GPU type: each loads, and the arithmetic in its comments follows from its values."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from pydantic import ValidationError

from serving.config import EMBEDDED_CHECKPOINT, Settings

PROFILES = sorted((Path(__file__).parents[1] / "deploy" / "profiles").glob("*.toml"))
GIB = 1 << 30
KIB = 1 << 10

WEIGHT_BYTES = {
    (None, 1): 62.361e9,
    (None, 2): 31.212e9,
    (None, 4): 15.637e9,
    ("fp8_per_channel", 1): 32.464e9,
    ("fp8 checkpoint", 1): 32.554e9,
    ("int4 checkpoint", 1): 17.983e9,
}
"""Weights on each GPU, by number format and number of GPUs; tests/cuda/test_profiles.py builds the model."""
KV_BYTES = 48 * 2 * 4 * 128 * 2
"""KV cache per token of the captioner: layers, keys and values, KV heads, head width, bytes of BF16."""
CAPTION_TOKENS = 1000
"""Tokens of a clip of 30 s: 400 of input and at most 600 of caption."""


def load(path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Load a profile as `captioner serve --config` does."""
    monkeypatch.setenv("CAPTIONER_CONFIG", "")
    return Settings.load(["--config", str(path)])


def stated(text: str, pattern: str) -> float:
    """Return a number in the comments."""
    found = re.search(pattern, text)
    assert found, pattern
    return float(found[1].replace(",", ""))


def test_there_are_profiles() -> None:
    """Profiles are found: the tests below would pass without any."""
    assert len(PROFILES) >= 6


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_a_profile_sets_what_it_says(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A profile loads, and uses the GPUs and the number format in its name."""
    settings = load(path, monkeypatch)
    assert settings.long_tokens_per_step is not None
    assert settings.long_tokens_per_step <= settings.step_tokens
    if found := re.match(r"(\d+)x", path.stem):
        assert int(found[1]) == settings.tensor_parallel * settings.min_engine_replicas
        assert settings.min_engine_replicas == 1 or settings.engine_on_gpu
        assert settings.dtype == "bfloat16"
        assert settings.is_embedded is False
        quantized = settings.quantization is not None or re.search("-(fp8|int4)$", settings.model) is not None
        assert (re.search("-(fp8|int4)$", path.stem) is not None) == quantized


@pytest.mark.parametrize("path", [path for path in PROFILES if path.stem[0].isdigit()], ids=lambda path: path.stem)
def test_a_profiles_memory_adds_up(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comment's figures follow from the settings; the longest context and `max_num_seqs` captions fit."""
    settings, text = load(path, monkeypatch), path.read_text()
    checkpoint = re.search("-(fp8|int4)$", settings.model)
    number_format = f"{checkpoint[1]} checkpoint" if checkpoint else settings.quantization
    weights_gib = WEIGHT_BYTES[number_format, settings.tensor_parallel] / GIB
    taken_gib = stated(text, r"of ([\d.]+) on the GPU") * settings.gpu_memory_utilization
    kv_gib = taken_gib - weights_gib - stated(text, r"working memory ([\d.]+)")
    kv_bytes = KV_BYTES / settings.tensor_parallel / (2 if settings.engine_args.get("kv_cache_dtype") == "fp8" else 1)
    tokens = kv_gib * GIB / kv_bytes

    assert stated(text, r"vLLM takes ([\d.]+)") == pytest.approx(taken_gib, abs=0.06)
    assert stated(text, r"weights ([\d.]+)") == pytest.approx(weights_gib, abs=0.06)
    assert stated(text, r"KV cache ([\d.]+)") == pytest.approx(kv_gib, abs=0.11)
    assert stated(text, r"tokens of ([\d.]+) KiB") * KIB == kv_bytes
    assert stated(text, r"= ([\d,]+) tokens") == pytest.approx(tokens, rel=0.01)
    assert stated(text, r"Room for (\d+) inputs") == pytest.approx(tokens // 31_800, abs=1)
    assert stated(text, r"or (\d+) captions") == pytest.approx(tokens / CAPTION_TOKENS, rel=0.01)
    assert tokens >= settings.max_model_len
    assert tokens >= settings.max_num_seqs * CAPTION_TOKENS


def test_the_stand_in_is_recognised_in_any_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of the stand-in is recognised; the captioner, and a damaged checkpoint, are not taken for it."""
    shutil.copytree(EMBEDDED_CHECKPOINT, tmp_path / "copy")
    monkeypatch.chdir(tmp_path)
    assert Settings(model="copy").is_embedded
    assert Settings(model=str(tmp_path / "copy")).is_embedded
    config = json.loads((EMBEDDED_CHECKPOINT / "config.json").read_text())
    config["thinker_config"]["text_config"]["hidden_size"] = 2048
    (tmp_path / "large").mkdir()
    (tmp_path / "large" / "config.json").write_text(json.dumps(config))
    assert not Settings(model="large").is_embedded
    (tmp_path / "large" / "config.json").write_text("nothing of the kind")
    assert not Settings(model=str(tmp_path / "large")).is_embedded
    assert not Settings(model="Qwen/Qwen3-Omni-30B-A3B-Captioner").is_embedded


def test_the_embedded_profile_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """The profile spells out the CPU's defaults alone, and its cache holds the stated tokens."""
    path = next(path for path in PROFILES if path.stem == "cpu-embedded")
    settings, text = load(path, monkeypatch), path.read_text()
    same = {"config", "dtype", "long_tokens_per_step"}
    assert settings.model_dump(exclude=same) == Settings().model_dump(exclude=same)
    config = json.loads((EMBEDDED_CHECKPOINT / "config.json").read_text())["thinker_config"]
    sizes = config["text_config"]
    kv_bytes = 2 * 4 * sizes["num_hidden_layers"] * sizes["num_key_value_heads"] * sizes["head_dim"]
    assert stated(text, r"tokens of ([\d.]+) KiB") * KIB == kv_bytes
    assert stated(text, r"= ([\d,]+) tokens") == pytest.approx(settings.cpu_kv_cache_gib * GIB / kv_bytes, rel=0.01)


@pytest.mark.parametrize("tensor_parallel", [1, 2, 4, 8])
def test_blocks_that_do_not_fit_the_experts_are_refused(tensor_parallel: int) -> None:
    """FP8 in blocks of 128 needs experts cut in multiples of 128; the message has the alternatives."""
    fits = tensor_parallel <= 2
    if fits:
        assert Settings(quantization="fp8_per_block", tensor_parallel=tensor_parallel).quantization
    else:
        with pytest.raises(ValidationError, match="use tensor_parallel 1 or 2, or fp8_per_channel"):
            Settings(quantization="fp8_per_block", tensor_parallel=tensor_parallel)
    assert Settings(quantization="fp8_per_channel", tensor_parallel=tensor_parallel).quantization
