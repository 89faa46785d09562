"""The systems of the first hour: this service, `vllm serve` and vllm-omni, with what GPUs need instead of a CPU."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

from benchmarks.compare.systems import LIMITS, Captioner, Server, VllmServe

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Self

    from benchmarks.gpu.plan import Plan


class Service(Captioner):
    """This service with the plan's settings, and others for one variant."""

    def __init__(self, plan: Plan, environment: Mapping[str, str] | None = None, **settings: Any) -> None:
        super().__init__(plan.setup)
        self._flags = plan.flags(**settings)
        args = {"CAPTIONER_ENGINE_ARGS": json.dumps(plan.engine_args)} if plan.engine_args else {}
        self._environment = {**args, **(environment or {})}

    @property
    def command(self) -> Sequence[str]:
        return [*super().command, "--log-format=json", *self._flags]

    @property
    def environment(self) -> Mapping[str, str]:
        return {**super().environment, **self._environment}

    def __enter__(self) -> Self:
        super().__enter__()
        return self

    def events(self, message: str) -> list[dict[str, Any]]:
        """Return the log's lines with this message."""
        found = []
        for line in self.log.read_text().splitlines():
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if isinstance(event, dict) and event.get("message") == message:
                found.append(event)
        return found


class Reference(VllmServe):
    """`vllm serve` with the service's settings; on the CPU as in the comparison, on GPUs with vLLM's own executor."""

    def __init__(self, plan: Plan, **arguments: Any) -> None:
        super().__init__(plan.setup)
        self._on_gpu = bool(plan.gpus)
        caches = ("--no-enable-prefix-caching", "--mm-processor-cache-gb=0")
        several = arguments.get("tensor_parallel", plan.tensor_parallel) > 1
        self.extra = (*(caches if self._on_gpu or several else VllmServe.extra), *plan.vllm_flags(**arguments))

    @property
    def environment(self) -> Mapping[str, str]:
        # The parent's looks for the CPU build. A WAV file of 40 minutes has 77 MB; vLLM admits 25 by default.
        own = Server.environment.fget(self) if self._on_gpu else super().environment  # type: ignore[attr-defined]
        return {**own, "VLLM_MAX_AUDIO_CLIP_FILESIZE_MB": "100"}


class Omni(Server):
    """vllm-omni's server with text output alone. Untried: no machine of this project has had it."""

    name = "vllm-omni"

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan.setup)
        self._flags = plan.vllm_flags()

    @property
    def command(self) -> Sequence[str]:
        return [
            *(sys.executable, "-m", "vllm_omni.entrypoints.cli.main", "serve", str(self._setup.model), "--omni"),
            *("--host=127.0.0.1", f"--port={self._port}", *self._setup.flags),
            f"--limit-mm-per-prompt={json.dumps(LIMITS)}",
            *self._flags,
        ]
