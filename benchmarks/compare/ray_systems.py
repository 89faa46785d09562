"""Those compared that run on Ray Serve: this service's cluster, and Ray's own server for language models."""

from __future__ import annotations

import json
import secrets
from pathlib import Path

from systems import MODEL_NAME, ONE_THREAD, Captioner, Server, shim

RAY_LLM_PYTHON = Path(__file__).parents[1] / ".cache/ray-llm/bin/python"
RAY_LLM_VLLM = "0.29.0"

SAME_PRIORITY = {"RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0"}
"""Ray would run its workers at niceness 15: at a disadvantage beside everything else on this machine."""


class CaptionerCluster(Captioner):
    """This service on Ray Serve, with one frontend and one engine."""

    name = "captioner cluster"
    subcommand = "cluster"

    @property
    def command(self) -> list[str]:
        return [*super().command, "--max-frontends=1", "--max-engine-replicas=1"]

    @property
    def environment(self) -> dict[str, str]:
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex()}
        return super().environment | SAME_PRIORITY | token


class RayServeLlm(Server):
    """`ray.serve.llm` with Ray's own defaults, and the vLLM that it pins. How to install it stands in `ray_llm.py`."""

    name = "ray.serve.llm"

    @property
    def command(self) -> list[str]:
        settings = {
            "model": str(self._setup.model),
            "name": MODEL_NAME,
            "port": self._port,
            "scratch": str(self._scratch / "ray"),
            "engine": self._setup.engine,
        }
        return [str(RAY_LLM_PYTHON), str(Path(__file__).with_name("ray_llm.py")), json.dumps(settings)]

    @property
    def environment(self) -> dict[str, str]:
        path = f"{shim(self._scratch, RAY_LLM_VLLM)}:{Path(__file__).parent}"
        engine = {"RAYLLM_VLLM_ENGINE_CLS": "ray_llm.SoloEngine", "HF_HUB_OFFLINE": "1"}
        return super().environment | ONE_THREAD | SAME_PRIORITY | engine | {"PYTHONPATH": path}

    def _is_ready(self) -> bool:
        return "\nready\n" in f"\n{self._log.read_text()}"


class RayServeLlmTuned(RayServeLlm):
    """The same with the switches that this service's cluster uses too: HAProxy, and fewer threads in between."""

    name = "ray.serve.llm, HAProxy"

    @property
    def environment(self) -> dict[str, str]:
        return super().environment | {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}
