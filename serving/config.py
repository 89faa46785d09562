"""Every setting of the service: frozen, typed, and the only reader of the environment.

A value comes from, first to last: a command-line flag, the variable `CAPTIONER_<NAME>`, a file `captioner_<name>` in
the directory `CAPTIONER_SECRETS_DIR` (as containers get secrets), the TOML file named by `CAPTIONER_CONFIG` (or
`--config`), the default below. `captioner serve --help` prints this list.
"""

from __future__ import annotations

import argparse
import ipaddress
import json
import os
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BeforeValidator, Field, SecretStr, model_validator
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SecretsSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

EMBEDDED_CHECKPOINT = Path(__file__).parent / "embedded" / "checkpoint"
"""The small stand-in of the captioner that ships with the package, in the production architecture."""

STAND_IN_WIDTH = 192
"""Of its text model; the captioner's is 2048."""

CAPTIONER_MODEL_ID = "qwen3-omni-30b-a3b-captioner"
"""The model's name in the API manual."""

MIB = 1024 * 1024

_EXPERT_SIZE = 768
"""Width of one expert of the captioner (`moe_intermediate_size`)."""
_FP8_BLOCK = 128


def _state_dir() -> Path:
    """Where programs keep what they have learned, by the rules of freedesktop.org."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "captioner"


def _is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _split(value: object) -> object:
    """Accept `a,b c` for a list, as one writes it in a variable."""
    return tuple(value.replace(",", " ").split()) if isinstance(value, str) else value


Words = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)]


class Settings(BaseSettings):
    """All settings. Units are in the names."""

    model_config = SettingsConfigDict(
        env_prefix="CAPTIONER_",
        env_ignore_empty=True,
        frozen=True,
        extra="forbid",
        cli_prog_name="captioner serve",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
        cli_show_env_vars=True,
    )

    config: Path | None = Field(None, description="TOML file of settings; CAPTIONER_CONFIG names it too")

    # Listener
    host: str = Field("127.0.0.1", description="Address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 picks a free one")
    public_url: str | None = Field(
        None, description="Origin that clients reach, for upload addresses; taken from each request if not set"
    )
    shutdown_grace_s: float = Field(300, ge=0, description="How long a graceful stop waits for what runs")

    # Model
    model: str = Field(
        str(EMBEDDED_CHECKPOINT),
        description="Checkpoint: a directory or a model hub's name; the default is the embedded stand-in",
    )
    served_model_name: str = Field(CAPTIONER_MODEL_ID, description="Name that requests carry in `model`")
    model_aliases: Words = Field((), description="Further accepted names")

    # Engine
    engine: Literal["vllm", "fake"] = Field("vllm", description="`fake` answers with set text at a set speed")
    tensor_parallel: int = Field(1, ge=1, description="GPUs (or CPU processes) that share one copy of the model")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Number format of weights and activations; auto: the checkpoint's own"
    )
    quantization: Literal["fp8_per_tensor", "fp8_per_channel", "fp8_per_block"] | None = Field(
        None, description="Quantize the language model while loading, never the audio tower; none: as the checkpoint is"
    )
    max_model_len: int = Field(65_536, ge=1024, description="Tokens of context: input and output together")
    max_input_tokens: int = Field(32_768, ge=64, description="Tokens of input at most")
    max_output_tokens: int = Field(32_768, ge=1, description="Tokens of output at most, and the default of max_tokens")
    max_num_seqs: int = Field(64, ge=1, description="Captions that the engine generates at the same time")
    max_num_batched_tokens: int | None = Field(
        None, ge=512, description="Tokens that one engine step handles at most; default: 8192, embedded stand-in 2048"
    )
    long_tokens_per_step: int | None = Field(
        None,
        ge=16,
        description="Of these, tokens for audios over 32 s, all together: fewer far into one, as they cost more. "
        "More ends long audios sooner, less disturbs the others less. At most half of a step; "
        "default: 2048, on the CPU 416",
    )
    gpu_memory_utilization: float = Field(0.90, gt=0, le=1, description="Share of each GPU's memory that vLLM takes")
    cpu_kv_cache_gib: int = Field(1, ge=1, description="Memory for the KV cache on a machine without GPU")
    enforce_eager: bool | None = Field(
        None,
        description="No compilation, no CUDA graphs: slower, but it starts faster; default: where there is no GPU",
    )
    cpu_kernels: bool | None = Field(
        None,
        description="Direct calls of vLLM's CPU kernels, fewer operations per step. Needs float32 weights, "
        "tensor_parallel 1 and enforce_eager. Default: on for the embedded checkpoint on a CPU, off otherwise",
    )

    # Fake engine (tests, load generators, client development)
    fake_ttft_s: float = Field(0.0, ge=0, description="Fake engine: time to the first token")
    fake_tpot_s: float = Field(0.0, ge=0, description="Fake engine: time per further token")
    fake_tokens: int = Field(24, ge=1, description="Fake engine: tokens of a caption")
    fake_kv_tokens: int = Field(1_000_000, ge=64, description="Fake engine: tokens of context that fit at once")
    fake_text: str | None = Field(
        None, description="Fake engine: what it says, a word per token, over and over; default: its own words"
    )
    fake_fail_share: float = Field(
        0, ge=0, le=1, description="Fake engine: share of captions that fail, after some number of tokens"
    )
    fake_log: Path | None = Field(
        None, description="Fake engine: file for what it hands over, a line each: request id, tokens"
    )
    fake_stall_file: Path | None = Field(None, description="Fake engine: it makes no step while this file exists")

    # Limits of a request (API manual; PROTOCOL 7.4)
    max_audio_s: float = Field(2400, gt=0, description="Longest audio")
    max_url_bytes: int = Field(1024 * MIB, ge=1, description="Largest file behind a URL")
    max_upload_bytes: int = Field(10 * MIB - 1, ge=1, description="Largest uploaded file")
    max_inline_chars: int = Field(10 * MIB - 1, ge=1, description="Longest base64 text")
    max_body_bytes: int = Field(16 * MIB, ge=1024, description="Largest request body")
    allow_ignore_eos: bool = Field(default=False, description="Accept `ignore_eos` in requests (benchmarks only)")

    # Load that is taken in; past it requests get 503 with Retry-After
    max_concurrent_requests: int = Field(512, ge=1, description="Requests under way at once")
    max_body_memory_bytes: int = Field(1024 * MIB, ge=MIB, description="Memory for request bodies at once")
    max_features_bytes: int = Field(512 * MIB, ge=MIB, description="Memory for features that wait for the engine")
    max_downloads_bytes: int = Field(8 * 1024 * MIB, ge=MIB, description="Disk for downloads under way")
    max_audio_queue: int = Field(256, ge=1, description="Clips that wait for an audio worker")
    max_engine_queue: int = Field(256, ge=1, description="Captions that wait for the engine")
    max_engine_wait_s: float = Field(120, gt=0, description="How long one waits for it; the longest clip yields half")

    # Watchdog
    engine_stall_timeout_s: float = Field(
        120, gt=0, description="An engine that owes tokens and takes no step for this long has failed"
    )

    # Audio workers
    audio_workers: int = Field(
        default_factory=lambda: max(1, len(os.sched_getaffinity(0))), ge=1, description="Processes that decode audio"
    )
    audio_timeout_s: float = Field(60, gt=0, description="CPU time for decoding one clip")

    # Egress guard of the URL fetch
    fetch_timeout_s: float = Field(60, gt=0, description="Total time for one download, redirects included")
    fetch_connect_timeout_s: float = Field(10, gt=0, description="Time to connect to one host")
    fetch_ports: Annotated[tuple[int, ...], NoDecode, BeforeValidator(_split)] = Field(
        (80, 443, 8000, 8080, 8443), description="Ports that downloads may use"
    )
    fetch_allow: Words = Field(
        (),
        description="Hosts (`media.internal`, `media.internal:9000`) and networks (`10.1.0.0/16`) that downloads may "
        "reach though the guard would refuse them, on any port unless one is named",
    )
    download_dir: Path | None = Field(None, description="Directory for downloads under way; default: the system's")

    # Answers
    response_timeout_s: float = Field(
        280, gt=0, description="Time for a whole (not streamed) answer; then what there is"
    )
    stream_timeout_s: float = Field(3600, gt=0, description="Time for a streamed answer; then it ends as `length`")
    heartbeat_s: float = Field(15, gt=0, description="Longest silence on a stream before a keep-alive comment")
    first_byte_timeout_s: float = Field(
        10, gt=0, description="How long a stream waits for the first token before it sends its status line"
    )
    header_timeout_s: float = Field(
        30, gt=0, description="How long a client may take for the head of a request; then its connection is dropped"
    )
    write_timeout_s: float = Field(
        60, gt=0, description="How long a client may read nothing of what waits for it; then its connection is dropped"
    )

    stream_flush_interval_s: float = Field(
        0.05, ge=0, description="Least time between two pieces of one caption, the first two excepted; 0: each token"
    )

    # Cluster (`captioner cluster`): frontends that take requests, and engine replicas with one model each
    min_frontends: int = Field(1, ge=1, description="Cluster: frontends at least")
    max_frontends: int = Field(8, ge=1, description="Cluster: frontends at most")
    frontend_cpus: float = Field(1, ge=0, description="Cluster: CPUs that a frontend and its audio workers reserve")
    target_clips_per_audio_worker: float = Field(
        0.75,
        gt=0,
        description="Cluster: clips per audio worker, or share of a core that a frontend's event loop takes, "
        "at which more frontends are started",
    )
    min_engine_replicas: int = Field(
        1, ge=0, description="Cluster: engine replicas at least; 0 frees the GPUs when nobody asks"
    )
    max_engine_replicas: int = Field(8, ge=1, description="Cluster: engine replicas at most")
    engine_cpus: float = Field(1, ge=0, description="Cluster: CPUs that an engine replica reserves")
    engine_on_gpu: bool = Field(
        default=False, description="Cluster: an engine replica takes `tensor_parallel` GPUs of one machine; else none"
    )
    pin_roles_to_nodes: bool = Field(
        default=False,
        description="Cluster: each frontend takes 1 of a node's Ray resource `frontend`, each engine replica 1 of `engine`; "
        "so that frontends stay off the GPU machines",
    )
    target_audio_seconds_per_engine: float = Field(
        900, gt=0, description="Cluster: seconds of audio under way in an engine at which another one is started"
    )
    scale_down_after_s: float = Field(300, ge=0, description="Cluster: how long fewer replicas must be enough")

    # Callers
    auth: bool = Field(default=True, description="Ask for keys; without, only on a loopback address")
    region: Literal["beijing", "singapore"] = Field(
        "beijing", description="The region that this service is; keys of the other's tenants are refused"
    )
    api_keys: Annotated[tuple[SecretStr, ...], NoDecode, BeforeValidator(_split)] = Field(
        (), description="Keys that are accepted beside those in the database, of a tenant `default`"
    )
    development_key: SecretStr | None = Field(
        None, description="Key of a tenant `development`; default: made at start if nobody has a key"
    )
    key_pepper: SecretStr | None = Field(
        None,
        min_length=16,
        description="Secret under which keys are hashed; must be equal on all replicas; default: a file in data_dir",
    )
    key_refresh_s: float = Field(
        1, gt=0, le=60, description="How often keys and tenants are looked at for changes: a revoked key works so long"
    )
    data_dir: Path = Field(
        default_factory=_state_dir, description="Directory for what must outlive the service; default: below your home"
    )
    database_url: SecretStr | None = Field(
        None, description="Tenants, keys, prices, usage: `postgresql://user@host/name`; default: SQLite in data_dir"
    )
    metering: bool = Field(
        default=True, description="Limits and the ledger; without, nothing is billed: to measure what they take"
    )
    redis_url: SecretStr | None = Field(
        None,
        description="Limits of tenants, counted for all replicas together: `redis://host:6379/0`; none: each process "
        "counts by itself",
    )
    max_journal_bytes: int = Field(
        256 * MIB, ge=MIB, description="Disk for usage that the database has not got; past it requests are refused"
    )
    uploads_dir: Path | None = Field(None, description="Directory of uploaded files; default: below the system's")
    upload_secret: SecretStr | None = Field(
        None, description="Secret that signs upload policies; must be equal on all replicas; default: made at start"
    )
    upload_policy_ttl_s: int = Field(300, ge=1, description="How long an upload policy is valid")
    upload_ttl_s: int = Field(48 * 3600, ge=1, description="How long an uploaded file is kept")
    max_uploads_bytes: int = Field(10 * 1024 * MIB, ge=MIB, description="Disk for uploaded files")

    # Logs
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least level that is logged")
    log_format: Literal["json", "text"] = Field("json", description="`json` for machines, `text` for a terminal")

    # Administration
    admin_host: str = Field("127.0.0.1", description="Address of the administration's HTTP API")
    admin_port: int | None = Field(
        None, ge=0, le=65535, description="Its port, another one than clients reach; none: there is no such API"
    )
    admin_token: SecretStr | None = Field(
        None, min_length=16, description="Bearer token that it asks for; needed with admin_port"
    )

    # Metrics and traces
    metrics_token: SecretStr | None = Field(
        None, description="Bearer token that scrapes of /metrics need; without, only a loopback listener tells tenants"
    )
    metrics_tenants: int = Field(100, ge=0, description="Tenants that metrics tell apart; the rest are `other`")
    metrics_port: int = Field(
        0,
        ge=0,
        le=65_000,
        description="Cluster: each process tells its metrics on the first free one of 32 ports from here; 0: any port",
    )
    vllm_metrics: bool = Field(default=True, description="vLLM's own metrics too")
    otlp_endpoint: str | None = Field(
        None, description="Where traces are sent (OTLP over HTTP, `http://collector:4318`); none: nothing is traced"
    )
    trace_ratio: float = Field(
        0.01, ge=0, le=1, description="Share of requests that are traced, if the caller does not decide"
    )

    @model_validator(mode="after")
    def _context_holds_input_and_output(self) -> Settings:
        if self.max_input_tokens >= self.max_model_len:
            msg = f"max_input_tokens ({self.max_input_tokens}) leaves no room in max_model_len ({self.max_model_len})"
            raise ValueError(msg)
        return self

    @model_validator(mode="after")
    def _strangers_stay_outside(self) -> Settings:
        if not self.auth and not _is_loopback(self.host):
            raise ValueError(f"auth can be switched off only on a loopback address, and host is {self.host}")
        return self

    @model_validator(mode="after")
    def _administration_is_not_for_everyone(self) -> Settings:
        if self.admin_port is not None and self.admin_token is None:
            raise ValueError("admin_port needs admin_token: the administration is not for everyone")
        if self.admin_port and self.admin_port == self.port:
            raise ValueError("admin_port must be another one than port, which clients reach")
        return self

    @model_validator(mode="after")
    def _bounds_are_in_order(self) -> Settings:
        if self.min_frontends > self.max_frontends or self.min_engine_replicas > self.max_engine_replicas:
            raise ValueError(
                "max_frontends and max_engine_replicas must not be below min_frontends and min_engine_replicas"
            )
        return self

    @model_validator(mode="after")
    def _blocks_fit_the_experts(self) -> Settings:
        if self.quantization == "fp8_per_block" and (share := _EXPERT_SIZE / self.tensor_parallel) % _FP8_BLOCK:
            msg = (
                f"quantization fp8_per_block needs blocks of {_FP8_BLOCK}; tensor_parallel {self.tensor_parallel} "
                f"cuts each expert's {_EXPERT_SIZE} to {share:g}: use tensor_parallel 1 or 2, or fp8_per_channel"
            )
            raise ValueError(msg)
        return self

    @property
    def secrets(self) -> dict[str, str]:
        """Those settings that nobody should see, by name, as one writes them in a variable."""
        found = {}
        for name in type(self).model_fields:
            match getattr(self, name):
                case SecretStr() as secret:
                    found[name] = secret.get_secret_value()
                case (SecretStr(), *_) as several:
                    found[name] = ",".join(secret.get_secret_value() for secret in several)
        return found

    @property
    def is_embedded(self) -> bool:
        """Whether the small stand-in is served rather than the captioner itself, wherever its checkpoint lies."""
        return _text_width(self.model) == STAND_IN_WIDTH

    @property
    def on_loopback(self) -> bool:
        """Whether only this machine reaches the listener."""
        return self.host in ("127.0.0.1", "::1", "localhost")

    @property
    def step_tokens(self) -> int:
        """Tokens that one engine step handles at most."""
        return self.max_num_batched_tokens or (2048 if self.is_embedded else 8192)

    @property
    def model_names(self) -> frozenset[str]:
        """Every name that a request may carry in `model`."""
        return frozenset((self.served_model_name, *self.model_aliases))

    @classmethod
    def load(cls, argv: Sequence[str]) -> Settings:
        """Settings from command-line flags, variables and the file. Raises `ValidationError`; `--help` exits."""
        flags = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        flags.add_argument("--config")
        if path := flags.parse_known_args(argv)[0].config:
            os.environ["CAPTIONER_CONFIG"] = path
        return cls(_cli_parse_args=list(argv))

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Arguments, then variables, then secrets, then the TOML file; command-line flags come before them all."""
        del dotenv_settings, file_secret_settings
        sources: list[PydanticBaseSettingsSource] = [init_settings, env_settings]
        if directory := os.environ.get("CAPTIONER_SECRETS_DIR"):
            if not Path(directory).is_dir():
                raise FileNotFoundError(f"the directory of secrets {directory} does not exist")
            sources.append(SecretsSettingsSource(settings_cls, secrets_dir=directory))
        if path := os.environ.get("CAPTIONER_CONFIG"):
            if not Path(path).is_file():
                raise FileNotFoundError(f"the settings file {path} does not exist")
            sources.append(TomlConfigSettingsSource(settings_cls, toml_file=path))
        return tuple(sources)


@cache
def _text_width(model: str) -> int | None:
    """The width of the text model of a checkpoint in a directory; None if it cannot be told."""
    try:
        width = json.loads(Path(model, "config.json").read_text())["thinker_config"]["text_config"]["hidden_size"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return width if isinstance(width, int) else None
