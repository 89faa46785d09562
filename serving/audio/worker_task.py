"""One clip on its way through the pool of audio workers, and what becomes of it."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from serving import errors
from serving.audio.worker_process import audio_error, map_features
from serving.observability.context import REQUEST_ID
from serving.types import MELS, Features

if TYPE_CHECKING:
    import asyncio

    from serving.audio.piece_file import PieceFile
    from serving.audio.worker_process import Clip
    from serving.scheduling.shared_capacity import Permit
    from serving.types import SchedulingClass

_BYTES_PER_S = 16_000
"""Rate for estimating a clip's length from its bytes, as if all were MP3 of 128 kb/s: nothing better is known yet."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Prepared:
    """Features of one clip, and the seconds of each stage. `queue_s` is the wait for a worker.

    Of a clip that was cut into pieces the features are in its `PieceFile`, and these have no frames.
    """

    features: Features
    queue_s: float
    decode_s: float
    features_s: float


@dataclass(eq=False, slots=True)
class Task:
    """A clip that waits for a worker or is processed by one."""

    scheduling_class: SchedulingClass
    clip: Clip
    audio_s: float
    """Estimated length."""
    cost: float
    """Time of a worker in seconds: first expected, then measured."""
    permit: Permit
    """Memory of the features, held from their arrival until the context is left."""
    answer: asyncio.Future[Prepared]
    arrived_s: float
    piece_file: PieceFile | None = None
    """File for the clip's pieces; `None` for a clip that is not cut."""
    queue_s: float = 0.0
    started_s: float = 0.0
    retried: bool = False
    """Set once a worker that had the clip was killed from outside."""
    request_id: str = field(default_factory=REQUEST_ID.get)

    def deliver(self, reply: dict[str, Any], descriptors: list[int]) -> None:
        """Resolve the task with its worker's reply. Raises `ValueError` and others for a reply that is not valid."""
        if "traceback" in reply:
            log.error("audio worker failed", extra={"traceback": reply["traceback"], "request_id": self.request_id})
            self.fail(errors.Internal())
        elif "error" in reply:
            self.fail(audio_error(reply["error"], reply["message"]))
        elif "disk_full" in reply:
            self.fail(errors.Overloaded(reason="downloads"))
        elif self.piece_file is not None:
            self.piece_file.load(reply["samples"], reply["table_bytes"])
            self._resolve(Features(np.empty((MELS, 0), np.float32), reply["samples"]), reply)
        else:
            features = map_features(reply, descriptors[0])
            self.permit.count(features.log_mel.nbytes)
            self._resolve(features, reply)

    def fail(self, error: errors.CaptionerError) -> None:
        """Resolve the task with an error, if it has no result yet."""
        if not self.answer.done():
            self.answer.set_exception(error)

    def _resolve(self, features: Features, reply: dict[str, Any]) -> None:
        self.answer.set_result(Prepared(features, self.queue_s, reply["decode_s"], reply["features_s"]))


def estimate_s(clip: Clip) -> float:
    """Estimate the length of a clip in seconds."""
    try:
        clip_bytes = clip.stat().st_size if isinstance(clip, Path) else len(clip)
    except OSError:
        return 0.0  # the worker will report it
    return (clip_bytes * 3 // 4 if isinstance(clip, str) else clip_bytes) / _BYTES_PER_S
