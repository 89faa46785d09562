"""Systems under comparison on Ray Serve: this service's cluster, and Ray's own server for language models."""

from __future__ import annotations

import json
import secrets
from typing import TYPE_CHECKING

from benchmarks.compare.systems import ONE_THREAD, Captioner, Server, vllm_cpu_shim
from benchmarks.load.wire import MODEL_NAME
from benchmarks.program import ROOT

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

RAY_LLM_PYTHON = ROOT / ".cache/ray-llm/bin/python"
RAY_LLM_VLLM = "0.29.0"

SAME_PRIORITY = {"RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0"}
"""Ray's default niceness of 15 would put its workers at a disadvantage to the other processes of this machine."""


class CaptionerCluster(Captioner):
    """This service on Ray Serve, with one frontend and one engine."""

    name = "captioner cluster"
    subcommand = "cluster"

    @property
    def command(self) -> Sequence[str]:
        return [*super().command, "--max-frontends=1", "--max-engine-replicas=1"]

    @property
    def environment(self) -> Mapping[str, str]:
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex()}
        return {**super().environment, **SAME_PRIORITY, **token}


class RayServeLlm(Server):
    """`ray.serve.llm` with Ray's defaults and the vLLM that Ray pins. `ray_llm.py` has the installation."""

    name = "ray.serve.llm"

    @property
    def command(self) -> Sequence[str]:
        settings = {
            "model": str(self._setup.model),
            "name": MODEL_NAME,
            "port": self._port,
            "scratch": str(self.directory / "ray"),
            "engine": self._setup.engine,
        }
        return [str(RAY_LLM_PYTHON), "-m", "benchmarks.compare.ray_llm", json.dumps(settings)]

    @property
    def environment(self) -> Mapping[str, str]:
        # Without this process's PYTHONPATH, which belongs to another environment.
        path = f"{vllm_cpu_shim(self.directory, RAY_LLM_VLLM)}:{ROOT}"
        engine = {"RAYLLM_VLLM_ENGINE_CLS": "benchmarks.compare.ray_llm.InProcessEngine", "HF_HUB_OFFLINE": "1"}
        return {**super().environment, **ONE_THREAD, **SAME_PRIORITY, **engine, "PYTHONPATH": path}

    def ready(self) -> bool:
        return "\nready\n" in f"\n{self.log.read_text()}"


class RayServeLlmTuned(RayServeLlm):
    """`ray.serve.llm` with the switches that this service's cluster uses, too: HAProxy, and fewer threads."""

    name = "ray.serve.llm, HAProxy"

    @property
    def environment(self) -> Mapping[str, str]:
        return {**super().environment, "RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}
