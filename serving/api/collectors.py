"""Collectors: bind each callback metric to the component that owns its value. Prometheus' scrapes read them."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import prometheus_client

from serving.engine.admission_control import AdmissionControl
from serving.engine.remote.client import RemoteEngine
from serving.engine.vllm.engine import VllmEngine
from serving.observability.cpu_time import CpuTime, descendants

if TYPE_CHECKING:
    from collections.abc import Callable

    from serving.api.components import Components
    from serving.config import Settings
    from serving.engine.base import Engine
    from serving.observability.metrics import Gauges


def bind_service_metrics(components: Components) -> None:
    """Bind the metrics of a frontend, or of the service on one machine, to its components."""
    metrics, workers, engine = components.metrics, components.workers, components.engine
    uploads, settings, watch = components.uploads, components.settings, metrics.bind
    downloads = components.downloads
    watch("captioner_audio_workers", lambda: settings.audio_workers)
    watch("captioner_audio_workers_busy", lambda: workers.busy)
    watch("captioner_audio_workers_busy_seconds_total", lambda: workers.busy_s)
    watch("captioner_audio_worker_deaths_total", lambda: workers.deaths)
    watch("captioner_downloads_running", lambda: downloads.running)
    watch("captioner_download_process_deaths_total", lambda: downloads.deaths)
    watch("captioner_audio_queue_depth", lambda: workers.queued)
    watch("captioner_audio_queue_audio_seconds", lambda: workers.queued_audio_s)
    watch("captioner_features_bytes", lambda: workers.outstanding_bytes)
    watch("captioner_body_bytes", lambda: components.bodies.used)
    watch("captioner_connections", lambda: components.connections.open)
    watch("captioner_connections_refused_total", lambda: dict(components.connections.refused))
    watch("captioner_uploads_bytes", lambda: uploads.used_bytes)
    watch("captioner_upload_received_bytes_total", lambda: uploads.received_bytes)
    saturation: dict[str, Callable[[], float]] = {
        "concurrent_requests": lambda: components.pipeline.in_flight / settings.max_concurrent_requests,
        "bodies": lambda: components.bodies.used / settings.max_body_memory_bytes,
        "downloads": lambda: max(
            downloads.used_bytes / settings.max_downloads_bytes, downloads.running / settings.max_downloads
        ),
        "audio_queue": lambda: workers.queued / settings.max_audio_queue,
        "features": lambda: workers.outstanding_bytes / settings.max_features_bytes,
        "uploads": lambda: uploads.used_bytes / settings.max_uploads_bytes,
    }
    cpu: dict[str, Callable[[], float]] = {
        "frontend": time.process_time,
        "audio": lambda: workers.cpu_s,
        "downloads": lambda: downloads.cpu_s,
    }
    if isinstance(engine, RemoteEngine):
        watch("captioner_engine_replicas", lambda: sum(engine.replicas.values()))
        watch("captioner_engine_replicas_ready", lambda: engine.replicas["ready"])
        watch("captioner_engine_retries_total", lambda: engine.retries)
    else:
        cpu["engine"] = _engine_cpu(engine)
        saturation |= _bind_engine_metrics(metrics, engine, settings)
    limits = components.usage_sessions.limiter.store
    watch("captioner_limits_store_up", lambda: float(not limits.degraded))
    watch("captioner_limits_fallbacks_total", lambda: limits.fallbacks)
    ledger, keys = components.usage_sessions.ledger, components.keys
    watch("captioner_keys_age_seconds", lambda: keys.age_s)
    watch("captioner_database_up", lambda: float(ledger.database_up and not keys.failing))
    watch("captioner_ledger_lag_seconds", lambda: ledger.lag_s)
    watch("captioner_ledger_pending", lambda: ledger.pending)
    watch("captioner_ledger_journal_bytes", lambda: ledger.journal_bytes)
    watch("captioner_ledger_journal_limit_bytes", lambda: settings.max_journal_bytes)
    watch("captioner_ledger_writable", lambda: float(ledger.writable))
    watch("captioner_ledger_unrecorded", lambda: ledger.unrecorded)
    watch("captioner_ledger_records_total", lambda: dict(ledger.closed))
    watch("captioner_ledger_write_failures_total", lambda: ledger.write_failures)
    saturation["journal"] = lambda: ledger.journal_bytes / settings.max_journal_bytes
    watch("captioner_saturation_ratio", lambda: {resource: read() for resource, read in saturation.items()})
    watch("captioner_cpu_seconds_total", lambda: {part: read() for part, read in cpu.items()})


def bind_replica_metrics(metrics: Gauges, engine: Engine, settings: Settings) -> None:
    """Bind the metrics of an engine replica of a cluster; frontends report the rest of the service's metrics."""
    saturation = _bind_engine_metrics(metrics, engine, settings)
    cpu = _engine_cpu(engine)
    metrics.bind("captioner_saturation_ratio", lambda: {resource: read() for resource, read in saturation.items()})
    metrics.bind("captioner_cpu_seconds_total", lambda: {"engine": cpu() + time.process_time()})


def _bind_engine_metrics(metrics: Gauges, engine: Engine, settings: Settings) -> dict[str, Callable[[], float]]:
    """Bind the metrics of this process's engine; return readers of the saturation of its bounds, 0 to 1."""
    watch = metrics.bind
    watch("captioner_engine_running", lambda: engine.load.running)
    watch("captioner_engine_waiting", lambda: engine.load.waiting)
    watch("captioner_engine_running_audio_seconds", lambda: engine.load.audio_s - engine.load.waiting_audio_s)
    watch("captioner_engine_waiting_audio_seconds", lambda: engine.load.waiting_audio_s)
    watch("captioner_engine_kv_tokens", lambda: engine.load.kv_tokens)
    watch("captioner_engine_kv_capacity_tokens", lambda: engine.load.kv_capacity_tokens)
    watch("captioner_engine_steps_total", lambda: engine.steps)
    if isinstance(engine, AdmissionControl):
        watch("captioner_engine_stalled_seconds", lambda: engine.stalled_s)
    watch("captioner_engine_gpus", lambda: model.gpus if (model := _vllm(engine)) else 0)
    # vLLM keeps its metrics in the default registry of the process that talks to the model's processes.
    metrics.include(prometheus_client.REGISTRY, "vllm:")
    return {
        "engine_queue": lambda: engine.load.waiting / settings.max_engine_queue,
        "kv_cache": lambda: engine.load.kv_tokens / max(1, engine.load.kv_capacity_tokens),
    }


def _engine_cpu(engine: Engine) -> Callable[[], float]:
    """Return a reader of the CPU time of the model's processes, in seconds."""
    model_time = CpuTime()
    return lambda: model_time.sample(descendants(model.pids if (model := _vllm(engine)) else ()))


def _vllm(engine: Engine) -> VllmEngine | None:
    bare = engine.engine if isinstance(engine, AdmissionControl) else engine
    return bare if isinstance(bare, VllmEngine) else None
