"""`captioner_saturation_ratio`: what each bound of the service holds, divided by the bound."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from serving.api.app import create_app
from serving.config import Settings
from serving.engine.base import Load
from serving.engine.fake import FakeEngine
from serving.types import NO_TENANT, SchedulingClass

if TYPE_CHECKING:
    from pathlib import Path


class Loaded(FakeEngine):
    """An engine with a queue of 3 captions and 60 of 240 tokens of context in use."""

    @property
    def load(self) -> Load:
        """See `Engine`."""
        return Load(running=1, waiting=3, audio_s=0.0, kv_tokens=60, kv_capacity_tokens=240, waiting_audio_s=0.0)


def test_each_bound_has_its_ratio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a half, a quarter or an eighth of a bound in use the ratio is that; unused bounds have 0."""
    settings = Settings(
        engine="fake",
        data_dir=tmp_path,
        download_dir=tmp_path,
        uploads_dir=tmp_path / "uploads",
        max_concurrent_requests=4,
        max_body_memory_bytes=400 * 2**20,
        max_audio_queue=8,
        max_features_bytes=8 * 2**20,
        max_engine_queue=12,
        max_uploads_bytes=400 * 2**20,
        max_downloads_bytes=400 * 2**20,
        max_downloads=10,
    )
    components: Any = create_app(settings, Loaded(settings)).state.components

    def ratio(resource: str) -> float | None:
        labels = {"resource": resource}
        found: float | None = components.metrics.registry.get_sample_value("captioner_saturation_ratio", labels)
        return found

    unused = ("concurrent_requests", "bodies", "audio_queue", "features", "uploads", "downloads", "journal")
    assert [ratio(resource) for resource in unused] == [0.0] * 7
    assert (ratio("engine_queue"), ratio("kv_cache")) == (0.25, 0.25)
    whose = SchedulingClass("a")
    components.pipeline._slots.permit(whose).count(2)
    components.bodies.permit(NO_TENANT).count(100 * 2**20)
    components.workers._features.permit(whose).count(2**20)
    monkeypatch.setattr(type(components.workers), "queued", 4)
    monkeypatch.setattr(type(components.uploads), "used_bytes", 300 * 2**20)
    monkeypatch.setattr(type(components.downloads), "used_bytes", 100 * 2**20)
    monkeypatch.setattr(type(components.downloads), "running", 1)
    used = ("concurrent_requests", "bodies", "features", "audio_queue", "uploads", "downloads")
    assert [ratio(resource) for resource in used] == [0.5, 0.25, 0.125, 0.5, 0.75, 0.25]
    monkeypatch.setattr(type(components.downloads), "running", 9)
    assert ratio("downloads") == 0.9
    ledger = components.usage_sessions.ledger
    monkeypatch.setattr(type(ledger), "journal_bytes", settings.max_journal_bytes // 2)
    assert ratio("journal") == pytest.approx(0.5)
