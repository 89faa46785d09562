"""The components that endpoints, error handlers and collectors share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from serving.api.connections import Connections
    from serving.api.dialects.base import Codec
    from serving.audio.download_process import DownloadProcess
    from serving.audio.worker_pool import AudioWorkerPool
    from serving.batch.files import Files
    from serving.batch.runner import BatchRunner
    from serving.batch.store import BatchStore
    from serving.config import Settings
    from serving.engine.base import Engine
    from serving.observability.metrics import Metrics
    from serving.observability.scrape_access import ScrapeAccess
    from serving.observability.service_discovery import Target
    from serving.pipeline import CaptionPipeline
    from serving.scheduling.shared_capacity import SharedCapacity
    from serving.storage.uploads import UploadStore
    from serving.tenancy.account import Accounts
    from serving.tenancy.idempotency import IdempotentAnswers
    from serving.tenancy.keys import Keyring
    from serving.tenancy.usage_session import UsageSessions
    from serving.timeline.captions import Timelines


@dataclass(frozen=True, slots=True)
class Components:
    """One instance of each component of this process, composed by `create_app`."""

    settings: Settings
    engine: Engine
    workers: AudioWorkerPool
    pipeline: CaptionPipeline
    timelines: Timelines
    uploads: UploadStore
    files: Files
    batches: BatchStore
    batch_runner: BatchRunner
    keys: Keyring
    idempotency: IdempotentAnswers
    usage_sessions: UsageSessions
    accounts: Accounts
    metrics: Metrics
    bodies: SharedCapacity
    """Memory of request bodies, in bytes."""
    connections: Connections
    openai: Codec
    dashscope: Codec
    downloads: DownloadProcess
    scrape_access: ScrapeAccess
    targets: Callable[[], list[Target]] | None = None
    """Metrics addresses of all processes of a cluster; `None` on one machine, which has this process alone."""

    async def check_ready(self) -> None:
        """Raise `ServerError` if no caption can be made now: the engine fails or nobody can be identified or billed."""
        self.keys.check_ready()
        self.usage_sessions.ledger.check_writable()
        await self.engine.check_health()
