"""Settings of the service: frozen, typed, and the only reader of the environment.

A value comes from, first to last: a command-line flag, the variable `CAPTIONER_<NAME>`, a file `captioner_<name>` in
the directory `CAPTIONER_SECRETS_DIR` (as containers get secrets), the TOML file named by `CAPTIONER_CONFIG` (or
`--config`), the default in `serving.settings`. `captioner serve --help` prints the list.
"""

from __future__ import annotations

import argparse
import ipaddress
import json
import os
from functools import cache
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

from pydantic import SecretStr, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SecretsSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from serving.settings import batch_groups, groups, object_store, operator_groups
from serving.settings.engine_args import reserved_problem
from serving.settings.groups import CAPTIONER_HUB_ID, CAPTIONER_MODEL_ID, EMBEDDED_CHECKPOINT
from serving.settings.types import METRICS_PORTS, MIB
from serving.types import Sampling

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = (
    "CAPTIONER_MODEL_ID",
    "EMBEDDED_CHECKPOINT",
    "METRICS_PORTS",
    "MIB",
    "STAND_IN_WIDTH",
    "Settings",
    "SettingsError",
)

STAND_IN_WIDTH = 192
"""Width of the text model of the embedded stand-in; the captioner's is 2048."""

_EXPERT_SIZE = 768
"""Width of one expert of the captioner (`moe_intermediate_size`)."""
_FP8_BLOCK = 128


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach the address."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost"
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


class Settings(
    # The reverse of `cli/setting_headings.py`: pydantic collects fields from the last base to the first.
    operator_groups.MetricsAndTraces,
    operator_groups.AdministrationApi,
    operator_groups.Logs,
    batch_groups.FilesAndBatches,
    object_store.ObjectStore,
    groups.Storage,
    groups.Callers,
    groups.Cluster,
    groups.Responses,
    groups.Downloads,
    groups.AudioWorkerPool,
    groups.Capacity,
    groups.RequestLimits,
    groups.FakeEngine,
    groups.Engine,
    groups.Model,
    groups.Listener,
    groups.SettingsFile,
    BaseSettings,
):
    """All settings, from every source. Raises `ValidationError`, which shows no input: it may be a secret."""

    model_config = SettingsConfigDict(
        env_prefix="CAPTIONER_",
        env_ignore_empty=True,
        frozen=True,
        extra="forbid",
        hide_input_in_errors=True,
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
        cli_exit_on_error=False,
    )

    @model_validator(mode="after")
    def _context_holds_input_and_output(self) -> Settings:
        if self.max_input_tokens >= self.max_model_len:
            raise ValueError(
                f"max_input_tokens: {self.max_input_tokens} leaves no room for output in max_model_len "
                f"{self.max_model_len}; set it below max_model_len"
            )
        return self

    @model_validator(mode="after")
    def _no_auth_needs_loopback(self) -> Settings:
        if not self.auth and not self.on_loopback:
            raise ValueError(
                f"auth: can be switched off only on a loopback address, and host is {self.host}; "
                "set host to 127.0.0.1 or leave auth on"
            )
        return self

    @model_validator(mode="after")
    def _administration_is_protected(self) -> Settings:
        if self.admin_port is not None and self.admin_token is None:
            raise ValueError("admin_token: required with admin_port; set CAPTIONER_ADMIN_TOKEN")
        if self.admin_port and self.admin_port == self.port:
            raise ValueError(f"admin_port: {self.admin_port} is also port, which clients reach; set another port")
        return self

    @model_validator(mode="after")
    def _metrics_ports_are_free(self) -> Settings:
        for name in ("port", "admin_port"):
            taken = getattr(self, name)
            if taken and self.metrics_port and self.metrics_port <= taken < self.metrics_port + METRICS_PORTS:
                raise ValueError(
                    f"metrics_port: {self.metrics_port} to {self.metrics_port + METRICS_PORTS - 1} include {name} "
                    f"{taken}; set a range without it"
                )
        return self

    @model_validator(mode="after")
    def _bounds_are_in_order(self) -> Settings:
        for kind in ("frontends", "engine_replicas"):
            least, most = getattr(self, f"min_{kind}"), getattr(self, f"max_{kind}")
            if least > most:
                raise ValueError(f"min_{kind}: {least} is above max_{kind} {most}; lower it or raise max_{kind}")
        return self

    @model_validator(mode="after")
    def _blocks_fit_the_experts(self) -> Settings:
        if self.quantization == "fp8_per_block" and (share := _EXPERT_SIZE / self.tensor_parallel) % _FP8_BLOCK:
            raise ValueError(
                f"quantization: fp8_per_block needs blocks of {_FP8_BLOCK}, and tensor_parallel {self.tensor_parallel} "
                f"cuts each expert's {_EXPERT_SIZE} to {share:g}; use tensor_parallel 1 or 2, or fp8_per_channel"
            )
        return self

    @model_validator(mode="after")
    def _engine_args_are_free(self) -> Settings:
        if problem := reserved_problem(self.engine_args):
            raise ValueError(problem)
        return self

    @property
    def secrets(self) -> dict[str, str]:
        """Values of the secret settings by name, in the form of a variable."""
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
        """True if the small stand-in is served rather than the captioner, in whatever directory its checkpoint is."""
        return _text_width(self.model) == STAND_IN_WIDTH

    @property
    def default_temperature(self) -> float:
        """Temperature of requests without one: the captioner's 0.6, or 0 for a stand-in whose checkpoint is greedy.

        The fake engine samples nothing and has the captioner's.
        """
        greedy = self.engine == "vllm" and self.is_embedded and _is_greedy(self.model)
        return 0.0 if greedy else Sampling().temperature

    @property
    def on_loopback(self) -> bool:
        """True if only this machine reaches the listener."""
        return is_loopback(self.host)

    @property
    def step_tokens(self) -> int:
        """Most tokens of one engine step."""
        return self.max_num_batched_tokens or (2048 if self.is_embedded else 8192)

    @property
    def model_names(self) -> frozenset[str]:
        """Every name that a request may carry in `model`: of the settings, and the checkpoint's own and hub name."""
        names = {self.served_model_name, *self.model_aliases}
        if not self.is_embedded:
            names.add(PurePath(self.model).name)
            if not self.model.startswith(("/", ".")):
                names.add(self.model)
        if CAPTIONER_MODEL_ID in names or CAPTIONER_HUB_ID in names:
            names |= {CAPTIONER_HUB_ID, PurePath(CAPTIONER_HUB_ID).name}
        return frozenset(names)

    @classmethod
    def load(cls, argv: Sequence[str]) -> Settings:
        """Load settings from command-line flags, variables, secrets and the file.

        Raises `ValidationError`, `SettingsError` for flags, `OSError` and `ValueError` for the file.
        """
        flags = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
        flags.add_argument("--config")
        try:
            path = flags.parse_known_args(argv)[0].config
        except argparse.ArgumentError as error:
            raise SettingsError(f"error parsing CLI: {error}") from None
        if path:
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
        """Order sources: arguments, variables, secrets, the TOML file; command-line flags come before all of them."""
        del dotenv_settings, file_secret_settings
        sources: list[PydanticBaseSettingsSource] = [init_settings, env_settings]
        if directory := os.environ.get("CAPTIONER_SECRETS_DIR"):
            if not Path(directory).is_dir():
                raise FileNotFoundError(f"CAPTIONER_SECRETS_DIR: the directory {directory} does not exist")
            sources.append(SecretsSettingsSource(settings_cls, secrets_dir=directory))
        if path := os.environ.get("CAPTIONER_CONFIG"):
            if not Path(path).is_file():
                raise FileNotFoundError(f"config: the file {path} does not exist")
            sources.append(TomlConfigSettingsSource(settings_cls, toml_file=path))
        return tuple(sources)


@cache
def _is_greedy(model: str) -> bool:
    """Return whether the generation defaults of a checkpoint in a directory choose the likeliest token."""
    try:
        return json.loads(Path(model, "generation_config.json").read_text()).get("do_sample") is False
    except (OSError, ValueError, AttributeError):
        return False


@cache
def _text_width(model: str) -> int | None:
    """Return the width of the text model of a checkpoint in a directory; None if it is unknown."""
    try:
        width = json.loads(Path(model, "config.json").read_text())["thinker_config"]["text_config"]["hidden_size"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return width if isinstance(width, int) else None
