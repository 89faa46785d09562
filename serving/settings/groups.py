"""Declarations of settings, one class per group of `captioner serve --help`; units are in the names.

Settings of the operator (logs, administration, metrics, traces) are in `operator_groups`.

A description is a noun phrase with its unit, then what `Default`, `Unset`, `Higher` or `Lower` mean where that is not
plain from the value. A setting without a default carries an `Example`, for the example file of `captioner settings`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, Field, SecretStr

from serving.settings.types import MIB, AnyTable, Bytes, Example, Networks, Numbers, Secrets, WebOrigins, Words

EMBEDDED_CHECKPOINT = Path(__file__).parents[1] / "embedded" / "checkpoint"
"""The small stand-in of the captioner that ships with the package, in the production architecture."""

CAPTIONER_MODEL_ID = "qwen3-omni-30b-a3b-captioner"
"""The model's name in the API manual."""


CAPTIONER_HUB_ID = "Qwen/Qwen3-Omni-30B-A3B-Captioner"
"""The model's name on model hubs."""


def _state_dir() -> Path:
    """Return the directory for state that outlives a program, by the rules of freedesktop.org."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "captioner"


class SettingsFile(BaseModel):
    """The TOML file with other settings."""

    config: Annotated[Path | None, Example("captioner.toml")] = Field(
        None, description="TOML file with settings by name. Unset: no file"
    )


class Listener(BaseModel):
    """Addresses and timing of the HTTP listener."""

    host: str = Field("127.0.0.1", description="Address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="TCP port to listen on; 0 picks a free one")
    public_url: Annotated[str | None, Example("https://captions.example.com")] = Field(
        None, description="Origin that clients reach, for upload addresses. Unset: taken from each request"
    )
    page: bool = Field(
        default=True,
        description="Pages for browsers at `/`: to try the service with a key, and on admin_port for administrators",
    )
    trusted_proxies: Networks = Field(
        ("127.0.0.0/8", "::1"),
        description="Addresses and networks of reverse proxies: their `Forwarded` and `X-Forwarded-…` headers are used "
        "for upload addresses, and their connections are not limited",
    )
    cors_origins: WebOrigins = Field(
        (),
        description="Origins of web pages whose scripts may call the service from a browser (CORS), such as "
        "`https://app.example.com`; `*`: all pages. Default: none",
    )
    max_connections_per_address: Annotated[int | None, Example(256)] = Field(
        None,
        ge=1,
        description="Most connections of one client address (of IPv6: one /64 network), trusted_proxies and loopback "
        "left out; further ones get 503. Unset: twice max_concurrent_requests",
    )
    header_timeout_s: float = Field(
        30, gt=0, description="Time in seconds for a client to send the headers of a request; then it is disconnected"
    )
    body_timeout_s: float = Field(
        30,
        gt=0,
        description="Time in seconds for a client to send the body of a request, and a second more for each 8 KiB that "
        "it has sent. Higher: slower clients are served",
    )
    shutdown_grace_s: float = Field(
        300, ge=0, description="Time in seconds that a graceful stop waits for running requests"
    )


class Model(BaseModel):
    """Checkpoint and names."""

    model: Annotated[str, Example("Qwen/Qwen3-Omni-30B-A3B-Captioner")] = Field(
        str(EMBEDDED_CHECKPOINT),
        description="Checkpoint: a directory, or a name on a model hub. Default: the embedded stand-in",
    )
    revision: Annotated[str | None, Example("v1.0")] = Field(
        None,
        min_length=1,
        description="Branch, tag or commit of the model at its hub; only a commit never changes. No effect on a "
        "directory. Unset: the hub's default branch",
    )
    served_model_name: str = Field(CAPTIONER_MODEL_ID, description="Name that requests carry in `model`")
    model_aliases: Words = Field(
        (),
        description="Further names that requests may carry in `model`; the checkpoint's name and its name on a hub are "
        "always accepted, and are not listed",
    )


class Engine(BaseModel):
    """vLLM, which generates captions."""

    engine: Literal["vllm", "fake"] = Field(
        "vllm", description="Engine: `vllm` runs the model, `fake` returns a fixed text at a fixed speed"
    )
    tensor_parallel: int = Field(1, ge=1, description="GPUs (or CPU processes) that share one copy of the model")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Number format of weights and activations; `auto`: the checkpoint's format"
    )
    quantization: Annotated[
        Literal["fp8_per_tensor", "fp8_per_channel", "fp8_per_block"] | None, Example("fp8_per_channel")
    ] = Field(
        None,
        description="Quantization of the language model while it loads, never of the audio tower. "
        "Unset: as the checkpoint is",
    )
    max_model_len: int = Field(65_536, ge=1024, description="Most tokens of context: input and output together")
    max_input_tokens: int = Field(32_768, ge=64, description="Most tokens of input; must be below max_model_len")
    max_output_tokens: int = Field(
        32_768, ge=1, description="Most tokens of output, and the default of `max_tokens` in requests"
    )
    max_num_seqs: int = Field(64, ge=1, description="Most captions that the engine generates at the same time")
    max_num_batched_tokens: Annotated[int | None, Example(8192)] = Field(
        None, ge=512, description="Most tokens of one engine step. Unset: 8192, for the embedded stand-in 2048"
    )
    long_tokens_per_step: Annotated[int | None, Example(2048)] = Field(
        None,
        ge=16,
        description="Tokens of one engine step for all audios over 32 s together; fewer far into an audio, where a "
        "token costs more; at most half of a step. Unset: 2048, on the CPU 416. Higher: long audios finish sooner. "
        "Lower: other requests are disturbed less",
    )
    gpu_memory_utilization: float = Field(
        0.90, gt=0, le=1, description="Share of each GPU's memory that vLLM reserves. Higher: more captions at once"
    )
    cpu_kv_cache_gib: int = Field(1, ge=1, description="Memory in GiB for the KV cache on a machine without GPU")
    enforce_eager: Annotated[bool | None, Example(value=False)] = Field(
        None,
        description="Execution without compilation and CUDA graphs: slower steps, but a faster start. "
        "Unset: on without GPU, else off",
    )
    cpu_kernels: Annotated[bool | None, Example(value=True)] = Field(
        None,
        description="Direct calls of vLLM's CPU kernels: fewer operations per step. They need float32 weights, "
        "tensor_parallel 1 and enforce_eager. Unset: on for the embedded checkpoint on a CPU, else off",
    )
    engine_args: Annotated[AnyTable, Example({"kv_cache_dtype": "fp8"})] = Field(
        default_factory=dict,
        description="Further arguments of vLLM's `AsyncEngineArgs` by name, as a table (`[engine_args]` at the end of "
        "a file) or as JSON; vLLM checks them, and arguments that other settings set are refused. No secrets. "
        "Default: none",
    )
    engine_stall_timeout_s: float = Field(
        120,
        gt=0,
        description="Time in seconds without an engine step while captions run, after which the engine has failed",
    )


class FakeEngine(BaseModel):
    """For tests, load generators and client development."""

    fake_ttft_s: float = Field(0.0, ge=0, description="Time in seconds to the first token")
    fake_tpot_s: float = Field(0.0, ge=0, description="Time in seconds per further token")
    fake_tokens: int = Field(24, ge=1, description="Tokens of a caption")
    fake_kv_tokens: int = Field(1_000_000, ge=64, description="Tokens of context that fit at the same time")
    fake_text: Annotated[str | None, Example("a dog barks twice")] = Field(
        None, description="Text of captions, a word per token, repeated as needed. Unset: a built-in text"
    )
    fake_fail_share: float = Field(0, ge=0, le=1, description="Share of captions that fail after some number of tokens")
    fake_log: Annotated[Path | None, Example("/tmp/fake-engine.log")] = Field(  # noqa: S108 - an example
        None, description="Log file of generated tokens, a line for each delta: request id, tokens. Unset: no log"
    )
    fake_stall_file: Annotated[Path | None, Example("/tmp/stall")] = Field(  # noqa: S108 - an example
        None, description="File that stalls the engine: no step completes while it exists. Unset: never stalled"
    )


class RequestLimits(BaseModel):
    """Bounds of one request (API manual; PROTOCOL 7.4)."""

    max_audio_s: float = Field(2400, gt=0, description="Longest audio in seconds")
    max_url_bytes: Bytes = Field(1024 * MIB, ge=1, description="Largest file behind a URL in bytes")
    max_upload_bytes: Bytes = Field(10 * MIB - 1, ge=1, description="Largest uploaded file in bytes")
    max_inline_chars: Bytes = Field(10 * MIB - 1, ge=1, description="Longest base64 text in characters")
    max_body_bytes: Bytes = Field(16 * MIB, ge=1024, description="Largest request body in bytes")
    max_transcription_bytes: Bytes = Field(
        25 * MIB, ge=1, description="Largest file of a form to `/v1/audio/transcriptions` in bytes"
    )
    allow_ignore_eos: bool = Field(default=False, description="Acceptance of `ignore_eos` in requests, for benchmarks")


class Capacity(BaseModel):
    """Bounds of the load that is accepted; past them requests get 503 with Retry-After."""

    max_concurrent_requests: int = Field(512, ge=1, description="Most requests in progress at the same time")
    max_body_memory_bytes: Bytes = Field(1024 * MIB, ge=MIB, description="Memory in bytes for all request bodies")
    max_features_bytes: Bytes = Field(
        512 * MIB, ge=MIB, description="Memory in bytes for all features that wait for the engine"
    )
    max_downloads_bytes: Bytes = Field(8 * 1024 * MIB, ge=MIB, description="Disk in bytes for all running downloads")
    max_downloads: int = Field(
        512,
        ge=1,
        description="Most running downloads of one frontend; one tenant alone may run two thirds of them",
    )
    max_audio_queue: int = Field(256, ge=1, description="Most clips that wait for an audio worker")
    max_engine_queue: int = Field(256, ge=1, description="Most captions that wait for the engine")
    max_engine_wait_s: float = Field(
        120,
        gt=0,
        description="Longest wait for the engine in seconds; shorter clips overtake the longest for at most half of it",
    )


class AudioWorkerPool(BaseModel):
    """Processes that decode audio and compute features."""

    audio_workers: Annotated[int, Example(8)] = Field(
        default_factory=lambda: max(1, len(os.sched_getaffinity(0))),
        ge=1,
        description="Processes that decode audio. Default: one per CPU that the service may use",
    )
    audio_timeout_s: float = Field(60, gt=0, description="CPU time in seconds for decoding one clip")


class Downloads(BaseModel):
    """Audio behind URLs, through the egress guard."""

    fetch_timeout_s: float = Field(60, gt=0, description="Time in seconds for one download, redirects included")
    fetch_connect_timeout_s: float = Field(10, gt=0, description="Time in seconds to connect to one host")
    fetch_min_bytes_per_s: int = Field(
        1000,
        ge=0,
        description="Least rate of a download's body in bytes per second, averaged over 10 s; slower ones "
        "are given up, and do not hold their share of max_downloads for fetch_timeout_s; 0: any rate",
    )
    fetch_ports: Numbers = Field((80, 443, 8000, 8080, 8443), description="TCP ports that downloads may use")
    fetch_allow: Words = Field(
        (),
        description="Hosts (`media.internal`, `media.internal:9000`) and networks (`10.1.0.0/16`) that downloads may "
        "reach although the egress guard would refuse them; on every port unless a port is given",
    )
    download_dir: Annotated[Path | None, Example("/var/tmp")] = Field(  # noqa: S108 - an example
        None, description="Directory for running downloads. Unset: the system's directory for temporary files"
    )


class Responses(BaseModel):
    """Timeouts and pace of responses."""

    response_timeout_s: float = Field(
        280,
        gt=0,
        description="Timeout of a non-streamed response in seconds; the partial text is returned when it expires",
    )
    stream_timeout_s: float = Field(
        3600, gt=0, description="Timeout of a streamed response in seconds; then it ends with finish reason `length`"
    )
    heartbeat_s: float = Field(
        15, gt=0, description="Longest silence on a stream in seconds before a keep-alive comment is sent"
    )
    first_byte_timeout_s: float = Field(
        10, gt=0, description="Longest wait in seconds of a stream for the first token before its status line is sent"
    )
    write_timeout_s: float = Field(
        60, gt=0, description="Time in seconds that a client may leave data unread; then it is disconnected"
    )
    stream_flush_interval_s: float = Field(
        0.05,
        ge=0,
        description="Least time in seconds between two pieces of one caption, after the first two; 0: each token. "
        "Higher: less CPU per token",
    )
    quality_guard: Literal["off", "stop", "retry"] = Field(
        "retry",
        description="Captions that repeat themselves without end: `stop` ends them early; `retry` also generates a "
        "response that is not streamed once more, unbilled, if it loops or is blank; `off` lets loops run to "
        "`max_tokens`. The header `x-captioner-guard` of a request may choose a weaker one",
    )


class Cluster(BaseModel):
    """Frontends, which take requests, and engine replicas with one model each (`captioner cluster`)."""

    min_frontends: int = Field(1, ge=1, description="Fewest frontends")
    max_frontends: int = Field(8, ge=1, description="Most frontends")
    frontend_cpus: float = Field(1, ge=0, description="CPUs that a frontend and its audio workers reserve")
    target_clips_per_audio_worker: float = Field(
        0.75,
        gt=0,
        description="Clips per audio worker, or share of a core that a frontend's event loop uses, above which "
        "frontends are added",
    )
    min_engine_replicas: int = Field(1, ge=0, description="Fewest engine replicas; 0 frees the GPUs of an idle service")
    max_engine_replicas: int = Field(8, ge=1, description="Most engine replicas")
    engine_cpus: float = Field(1, ge=0, description="CPUs that an engine replica reserves")
    engine_on_gpu: bool = Field(
        default=False, description="Reservation of `tensor_parallel` GPUs of one machine by each engine replica"
    )
    pin_roles_to_nodes: bool = Field(
        default=False,
        description="Reservation of 1 of a node's Ray resource `frontend` by each frontend, and of 1 of `engine` by "
        "each engine replica; keeps frontends off GPU machines",
    )
    target_audio_seconds_per_engine: float = Field(
        900, gt=0, description="Seconds of audio in progress per engine replica, above which replicas are added"
    )
    scale_down_after_s: float = Field(
        300, ge=0, description="Time in seconds for which fewer replicas must suffice before replicas are removed"
    )
    haproxy_metrics_port: int = Field(
        9101, ge=1, le=65535, description="TCP port of HAProxy's metrics on `host` (`captioner cluster`)"
    )
    haproxy_stats_port: int = Field(
        8404, ge=1, le=65535, description="TCP port of HAProxy's statistics on `host` (`captioner cluster`)"
    )
    ray_first_port: Annotated[int | None, Example(20000)] = Field(
        None,
        ge=1024,
        le=64536,
        description="First of 1000 consecutive TCP ports for Ray's processes (`captioner cluster`); they are on "
        "loopback unless `host` is every address. Unset: free ports",
    )


class Callers(BaseModel):
    """Authentication of callers."""

    auth: bool = Field(
        default=True, description="Authentication by API keys; off is allowed on loopback addresses only"
    )
    region: Literal["beijing", "singapore"] = Field(
        "beijing", description="Region of this service; keys of tenants of the other region are refused"
    )
    api_keys: Secrets = Field(
        (), description="API keys of a tenant `default`, accepted in addition to the keys in the database"
    )
    development_key: SecretStr | None = Field(
        None,
        description="API key of a tenant `development`. Unset: made at start if there is no key and logs are `text`",
    )
    key_pepper: SecretStr | None = Field(
        None,
        min_length=16,
        description="Secret under which keys are hashed; must be equal on all replicas. Unset: a file in data_dir",
    )
    key_refresh_s: float = Field(
        1,
        gt=0,
        le=60,
        description="Interval in seconds of reading changes of keys and tenants; a revoked key works until then",
    )


class Storage(BaseModel):
    """Database, usage journal and uploaded files."""

    data_dir: Annotated[Path, Example("/var/lib/captioner")] = Field(
        default_factory=_state_dir,
        description="Directory for state that outlives the service: usage journal, SQLite, the keys' pepper. "
        "Default: `captioner` in $XDG_STATE_HOME, else in ~/.local/state",
    )
    database_url: Annotated[SecretStr | None, Example("postgresql://captioner@database/captioner")] = Field(
        None,
        description="Database of tenants, keys, prices and usage: `postgresql://user@host/name`. "
        "Unset: SQLite in data_dir",
    )
    metering: bool = Field(
        default=True, description="Limits and the usage ledger; without it nothing is billed (to measure its cost)"
    )
    redis_url: Annotated[SecretStr | None, Example("redis://redis:6379/0")] = Field(
        None,
        description="Redis in which all replicas count the tenants' limits together: `redis://host:6379/0`. "
        "Unset: each process counts alone",
    )
    max_journal_bytes: Bytes = Field(
        256 * MIB,
        ge=MIB,
        description="Disk in bytes for usage that is not yet in the database; past it requests are refused",
    )
    uploads_dir: Annotated[Path | None, Example("/var/lib/captioner/uploads")] = Field(
        None, description="Directory of uploaded files, which replicas share. Unset: `uploads` in data_dir"
    )
    upload_secret: SecretStr | None = Field(
        None, description="Secret that signs upload policies; must be equal on all replicas. Unset: made at start"
    )
    upload_policy_ttl_s: int = Field(300, ge=1, description="Validity of an upload policy in seconds")
    upload_ttl_s: int = Field(48 * 3600, ge=1, description="Retention of an uploaded file in seconds")
    max_uploads_bytes: Bytes = Field(
        10 * 1024 * MIB, ge=MIB, description="Disk in bytes for all uploaded files; each counts as 4 KiB at least"
    )
    max_uploads_per_tenant: int = Field(
        100_000, ge=1, description="Most uploaded files of one tenant that are kept, so that no tenant uses all inodes"
    )
