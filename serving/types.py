"""Types of the domain: frozen, free of wire formats, of HTTP and of any engine.

Units are in the names: `_s` seconds, `_bytes` bytes, `_tokens` tokens.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

SAMPLE_RATE = 16_000
"""Samples per second of every `Features` (the model's feature extractor expects 16 kHz mono)."""

MELS, FRAMES_PER_S = 128, 100
"""Shape of log-mel features: bins of a frame, and frames per second."""

SCAFFOLD_TOKENS = 8
"""Text tokens of the chat scaffold around the audio, billed as `text_tokens` (API manual, PROTOCOL 10.1)."""


@dataclass(frozen=True, slots=True)
class UrlAudio:
    """Audio behind an http(s) URL, exactly as the client wrote it (percent-escapes untouched)."""

    url: str


@dataclass(frozen=True, slots=True)
class InlineAudio:
    """Audio carried inside the request as base64 text, not yet decoded."""

    base64: str


@dataclass(frozen=True, slots=True)
class UploadedAudio:
    """Audio uploaded before, by its opaque key (the part after `oss://`)."""

    key: str


@dataclass(frozen=True, slots=True)
class FileAudio:
    """Audio carried inside the request as the bytes of a file."""

    data: bytes


@dataclass(frozen=True, slots=True)
class StoredAudio:
    """Audio of a stored file, by the file's id (`file-…`)."""

    file_id: str


AudioSource = UrlAudio | InlineAudio | UploadedAudio | FileAudio | StoredAudio


@dataclass(frozen=True, slots=True)
class SchedulingClass:
    """The tenant that work belongs to, and how it is scheduled: tenants share capacity by `weight`.

    Work of a higher `priority` is served first, unless work of a lower priority has waited too long.
    """

    tenant: str = ""
    weight: float = 1.0
    priority: int = 0


NO_TENANT = SchedulingClass()
"""Work that belongs to no tenant; all of it is scheduled as one."""


class Region(enum.StrEnum):
    """The manual's two regions. A key of one region is refused in the other."""

    BEIJING = "beijing"
    SINGAPORE = "singapore"


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of a tenant, or of one of its keys; `None`: unlimited.

    Tokens are those billed, input and output together. Money is in nano-units (1e-9) of the region's currency, since
    prices per token have no exact value in larger ones.
    """

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    audio_seconds_per_minute: int | None = None
    concurrent_requests: int | None = None
    concurrent_audio_seconds: int | None = None
    tokens_per_day: int | None = None
    tokens_per_month: int | None = None
    nanos_per_day: int | None = None
    nanos_per_month: int | None = None


@dataclass(frozen=True, slots=True)
class FreeQuota:
    """Free tokens, until `ends_at` (seconds since the epoch). With `only`, requests beyond them are refused."""

    tokens: int
    ends_at: float
    only: bool = False


@dataclass(frozen=True, slots=True)
class Caller:
    """An authenticated caller: a tenant, by one of its keys, and the limits of both."""

    tenant_id: str
    key_id: str
    region: Region = Region.BEIJING
    scheduling_class: SchedulingClass = field(default_factory=SchedulingClass)
    tenant_limits: Limits = field(default_factory=Limits)
    key_limits: Limits = field(default_factory=Limits)
    free_quota: FreeQuota | None = None
    log_content: bool = False
    """Captions of this tenant may be logged, as the tenant requested."""
    batch_price_percent: int = 100
    """Price of a token in a batch, in percent of the list price."""


class Guard(enum.StrEnum):
    """Policy of the quality guard (`quality.py`)."""

    OFF = "off"
    STOP = "stop"
    """Captions end where they loop."""
    RETRY = "retry"
    """As `STOP`; and a response that is not streamed is generated once more if it loops or is blank."""


class Defect(enum.StrEnum):
    """Defect of a caption, as the quality guard recognises it."""

    LOOP = "loop"
    """It repeats itself without end; the engine stopped it."""
    BLANK = "blank"
    """It has no text but white space."""
    SHORT = "short"
    """It has one token."""
    CUT = "cut"
    """It reached its `max_tokens`."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """Sampling parameters. Defaults are the model card's; the codecs check the ranges.

    `top_k` 0 means off. `stop_token_ids` are single tokens. What stops a caption is not part of it, unless
    `include_stop`. `min_p` is a share of the most likely token's probability; `min_tokens` is the number of tokens
    before which no token ends the caption; `logit_bias` has pairs of token and bias. An empty `allowed_token_ids`
    allows all.
    """

    temperature: float = 0.6
    top_p: float = 0.95
    top_k: int = 20
    max_tokens: int = 32_768
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    stop_token_sequences: tuple[tuple[int, ...], ...] = ()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    include_stop: bool = False
    min_p: float = 0.0
    min_tokens: int = 0
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] = ()
    bad_words: tuple[str, ...] = ()
    logprobs: int | None = None
    """Number of likeliest tokens to report with each token; `None`: no probabilities."""
    stop_loops: bool = False
    """End the caption where it repeats itself without end."""
    ignore_eos: bool = False
    """Benchmarks only: run to `max_tokens`. The codecs accept it only when the settings allow it."""

    @property
    def steers_length(self) -> bool:
        """True if the client's stops, or its choice of tokens, may decide on the length of the caption."""
        stops = self.stop or self.stop_token_ids or self.stop_token_sequences
        return bool(stops or self.logit_bias or self.allowed_token_ids or self.bad_words or self.min_tokens)


@dataclass(frozen=True, slots=True)
class TimelineOptions:
    """Options of a timeline: longest segment, and what segments report in addition to times and caption."""

    max_segment_s: float = 30.0
    loudness: bool = False
    speech_share: bool = False


@dataclass(frozen=True, slots=True)
class CaptionRequest:
    """One request for one caption, decoded from its dialect."""

    request_id: str
    model: str
    audio: AudioSource
    sampling: Sampling = field(default_factory=Sampling)
    guard: Guard = Guard.RETRY
    """The strongest policy of the quality guard that the client wants."""
    timeline: TimelineOptions | None = None
    """Options of a timeline, each of whose segments has a caption; `None` for one caption of the whole audio."""


@dataclass(frozen=True, slots=True)
class Features:
    """Log-mel features of one clip, ready for the engine.

    `log_mel`: float32, shape (128, frames), one frame per 160 samples (10 ms), frames = samples // 160
    but at least one, equal to `WhisperFeatureExtractor` without padding. `samples`: decoded samples at 16 kHz.
    """

    log_mel: npt.NDArray[np.float32]
    samples: int

    @property
    def duration_s(self) -> float:
        """Length of the decoded audio in seconds."""
        return self.samples / SAMPLE_RATE


@dataclass(frozen=True, slots=True)
class AudioPiece:
    """One piece of an audio, of those that tile it: samples `begin` to `end` at 16 kHz.

    `audio_begin` to `audio_end` are the samples that are captioned, which reach beyond the piece where it is cut within
    a sound. `loudness_db` is in LUFS, `None` for silence; `speech_share` is the part of the piece in which somebody
    speaks.
    """

    begin: int
    end: int
    audio_begin: int
    audio_end: int
    loudness_db: float | None
    speech_share: float


class FinishReason(enum.StrEnum):
    """Reason for the end of a caption: the model's end token or a stop, or a limit (tokens or deadline)."""

    STOP = "stop"
    LENGTH = "length"


class Outcome(enum.StrEnum):
    """End of a request: the ledger's column `ending`, and the label `outcome` of metrics, traces and log lines.

    `errors.outcome_of` derives the outcome, with an error code, from the exception that ended the request.
    """

    FINISHED = "finished"
    PARTIAL = "partial"
    """The response's deadline cut the caption; the caller has the text that was generated until then."""
    REJECTED = "rejected"
    """The audio cannot be fetched, read or accepted, or a limit is reached: the caller can correct the request."""
    FAILED = "failed"
    """The service failed before anything was generated."""
    FAILED_MIDSTREAM = "failed_midstream"
    """The service failed after it had generated something."""
    DISCONNECTED = "disconnected"
    """The caller has left."""
    CANCELLED = "cancelled"
    """The service was stopped and did not wait for the request."""
    LOST = "lost"
    """The request's process was killed or its machine is gone; another process closed the record. Or an attempt of a
    batch's line, which is repeated; the last attempt replaces the record."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens as billed (API manual): 12.5 per second of audio, the scaffold, and the generated tokens."""

    audio_tokens: int
    output_tokens: int = 0
    text_tokens: int = SCAFFOLD_TOKENS

    @property
    def input_tokens(self) -> int:
        """Audio and scaffold together."""
        return self.audio_tokens + self.text_tokens

    @property
    def total_tokens(self) -> int:
        """Input and output together."""
        return self.input_tokens + self.output_tokens


LEAST_LOGPROB = -9999.0
"""Logarithm in place of that of 0, which JSON has not."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token of a caption: its text, the logarithm of its probability, and both of the likeliest tokens in its place.

    Probabilities are the model's own, before temperature and other parameters of sampling.
    """

    text: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True)
class CaptionDelta:
    """The next piece of a caption. `usage` counts everything up to and with this piece.

    The last delta carries the finish reason (its text may be empty). `partial` marks a caption that was cut off by
    the deadline of a non-streamed response (PROTOCOL 10.4). `stopped`: the caption ends early because of this defect.
    `retried`: a second sample was generated because of this defect of the first.
    """

    text: str
    usage: Usage
    finish_reason: FinishReason | None = None
    partial: bool = False
    stopped: Defect | None = None
    retried: Defect | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    """Probabilities of the tokens generated since the last delta, if requested; the text may lag behind."""


def billed_audio_tokens(samples: int) -> int:
    """Return audio tokens as billed: 12.5 per second, at least one second, fractions rounded up (PROTOCOL 10.1)."""
    return max(13, math.ceil(25 * samples / (2 * SAMPLE_RATE)))
