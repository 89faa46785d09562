"""What is read at each scrape: where each value of `metrics.WATCHED` comes from."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import prometheus_client

from serving.engine.admission_control import GatedEngine
from serving.engine.remote.client import RemoteEngine
from serving.engine.vllm.engine import VllmEngine
from serving.observability.cpu_time import CpuTime, descendants

if TYPE_CHECKING:
    from collections.abc import Callable

    from serving.api.routes import Service
    from serving.config import Settings
    from serving.engine.base import Engine
    from serving.observability.metrics import Gauges


def watch_service(service: Service) -> None:
    """Tell what the service's parts have taken on."""
    metrics, workers, engine, settings = service.metrics, service.workers, service.engine, service.settings
    uploads, watch = service.uploads, metrics.watch
    watch("captioner_audio_workers", lambda: settings.audio_workers)
    watch("captioner_audio_workers_busy", lambda: workers.busy)
    watch("captioner_audio_workers_busy_seconds_total", lambda: workers.busy_s)
    watch("captioner_audio_worker_deaths_total", lambda: workers.deaths)
    watch("captioner_audio_queue_depth", lambda: workers.queued)
    watch("captioner_audio_queue_audio_seconds", lambda: workers.queued_audio_s)
    watch("captioner_features_bytes", lambda: workers.outstanding_bytes)
    watch("captioner_body_bytes", lambda: service.bodies.used)
    watch("captioner_uploads_bytes", lambda: uploads.used_bytes)
    watch("captioner_upload_received_bytes_total", lambda: uploads.received_bytes)
    taken: dict[str, Callable[[], float]] = {
        "concurrent_requests": lambda: service.captioner.in_flight / settings.max_concurrent_requests,
        "bodies": lambda: service.bodies.used / settings.max_body_memory_bytes,
        "downloads": lambda: service.fetcher.used_bytes / settings.max_downloads_bytes,
        "audio_queue": lambda: workers.queued / settings.max_audio_queue,
        "features": lambda: workers.outstanding_bytes / settings.max_features_bytes,
        "uploads": lambda: uploads.used_bytes / settings.max_uploads_bytes,
    }
    cpu: dict[str, Callable[[], float]] = {"frontend": time.process_time, "audio": lambda: workers.cpu_s}
    if isinstance(engine, RemoteEngine):
        watch("captioner_engine_replicas", lambda: sum(engine.replicas.values()))
        watch("captioner_engine_replicas_ready", lambda: engine.replicas["ready"])
        watch("captioner_engine_retries_total", lambda: engine.retries)
    else:
        cpu["engine"] = _engine_cpu(engine)
        taken |= _watch_engine(metrics, engine, settings)
    limits = service.usage_sessions.limiter.store
    watch("captioner_limits_store_up", lambda: float(not limits.degraded))
    watch("captioner_limits_fallbacks_total", lambda: limits.fallbacks)
    ledger = service.usage_sessions.ledger
    watch("captioner_keys_age_seconds", lambda: service.keys.age_s)
    watch("captioner_database_up", lambda: float(ledger.database_up and not service.keys.failing))
    watch("captioner_ledger_lag_seconds", lambda: ledger.lag_s)
    watch("captioner_ledger_pending", lambda: ledger.pending)
    watch("captioner_ledger_journal_bytes", lambda: ledger.journal_bytes)
    watch("captioner_ledger_journal_limit_bytes", lambda: settings.max_journal_bytes)
    watch("captioner_ledger_records_total", lambda: dict(ledger.closed))
    watch("captioner_ledger_write_failures_total", lambda: ledger.write_failures)
    taken["journal"] = lambda: ledger.journal_bytes / settings.max_journal_bytes
    watch("captioner_saturation_ratio", lambda: {resource: read() for resource, read in taken.items()})
    watch("captioner_cpu_seconds_total", lambda: {part: read() for part, read in cpu.items()})


def watch_replica(metrics: Gauges, engine: Engine, settings: Settings) -> None:
    """Tell what an engine replica of a cluster has taken on: the frontend's part of its metrics is told by frontends."""
    taken = _watch_engine(metrics, engine, settings)
    cpu = _engine_cpu(engine)
    metrics.watch("captioner_saturation_ratio", lambda: {resource: read() for resource, read in taken.items()})
    metrics.watch("captioner_cpu_seconds_total", lambda: {"engine": cpu() + time.process_time()})


def _watch_engine(metrics: Gauges, engine: Engine, settings: Settings) -> dict[str, Callable[[], float]]:
    """Tell what the engine of this process has taken on; return how full its bounds are."""
    watch = metrics.watch
    watch("captioner_engine_running", lambda: engine.load.running)
    watch("captioner_engine_waiting", lambda: engine.load.waiting)
    watch("captioner_engine_running_audio_seconds", lambda: engine.load.audio_s - engine.load.waiting_audio_s)
    watch("captioner_engine_waiting_audio_seconds", lambda: engine.load.waiting_audio_s)
    watch("captioner_engine_kv_tokens", lambda: engine.load.kv_tokens)
    watch("captioner_engine_kv_capacity_tokens", lambda: engine.load.kv_capacity_tokens)
    watch("captioner_engine_steps_total", lambda: engine.steps)
    if isinstance(engine, GatedEngine):
        watch("captioner_engine_stalled_seconds", lambda: engine.silent_s)
    watch("captioner_engine_gpus", lambda: model.gpus if (model := _vllm(engine)) else 0)
    # vLLM keeps its own in the default registry of the process that talks to the model's.
    metrics.include(prometheus_client.REGISTRY, "vllm:")
    return {
        "engine_queue": lambda: engine.load.waiting / settings.max_engine_queue,
        "kv_cache": lambda: engine.load.kv_tokens / max(1, engine.load.kv_capacity_tokens),
    }


def _engine_cpu(engine: Engine) -> Callable[[], float]:
    """Read the CPU time of the model's processes."""
    time_of_model = CpuTime()
    return lambda: time_of_model.look(descendants(model.pids if (model := _vllm(engine)) else ()))


def _vllm(engine: Engine) -> VllmEngine | None:
    inner = engine.inner if isinstance(engine, GatedEngine) else engine
    return inner if isinstance(inner, VllmEngine) else None
