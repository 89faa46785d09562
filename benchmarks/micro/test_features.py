"""Log-mel features of 10 s: this service, and the model's own extractor as reference.

pytest benchmarks/micro/test_features.py
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from transformers import WhisperFeatureExtractor

from serving.audio.features import log_mel

if TYPE_CHECKING:
    from collections.abc import Callable

SAMPLES = np.random.default_rng(1).normal(0, 0.1, 160_000).astype(np.float32)


@pytest.fixture(scope="module")
def extractor() -> Any:
    """The model's extractor."""
    return WhisperFeatureExtractor(feature_size=128)


def test_service(benchmark: Callable[..., Any]) -> None:
    """The service returns a frame for each 10 ms."""
    assert benchmark(log_mel, SAMPLES).shape == (128, 1000)


def test_extractor(benchmark: Callable[..., Any], extractor: Any) -> None:
    """The extractor of transformers returns a frame for each 10 ms."""
    made = benchmark(extractor, SAMPLES, sampling_rate=16_000, padding=False, truncation=False)
    assert made["input_features"][0].shape == (128, 1000)
