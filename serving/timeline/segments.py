"""Segments of a timeline: pieces of the audio with their captions."""

from __future__ import annotations

from dataclasses import dataclass

from serving.types import FinishReason


@dataclass(frozen=True, slots=True)
class Segment:
    """Caption of one piece of the audio, from `start_s` to `end_s`, in seconds from the beginning.

    The segments of a timeline tile its audio: each starts where the one before ends. `loudness_db` is the piece's level
    in LUFS, `None` if it is not requested or the piece is silent. `speech_share` is the part of the piece in which
    somebody seems to speak, from 0 to 1, `None` if it is not requested. A piece without a caption has the code of the
    `error`, and no finish reason.
    """

    index: int
    start_s: float
    end_s: float
    caption: str
    loudness_db: float | None
    speech_share: float | None
    finish_reason: FinishReason | None = FinishReason.STOP
    error: str | None = None
