"""Command that KubeRay's operator derives from a group of the RayService (KubeRay v1.6, `common/pod.go`)."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

KNOWN = {"CPU": "num-cpus", "GPU": "num-gpus", "memory": "memory"}


def start_command(group: Mapping[str, Any], *, head: bool, **changed: object) -> str:
    """Return `KUBERAY_GEN_RAY_START_CMD` of a group; `changed` overrides parameters of `ray start`."""
    parameters = dict(group["rayStartParams"])
    custom = {}
    for name, quantity in group["resources"].items():
        if name in KNOWN:
            parameters[KNOWN[name]] = quantity
        else:
            custom[name] = float(quantity)
    if custom:
        parameters["resources"] = f"'{json.dumps(custom, separators=(',', ':'))}'"
    parameters |= {name.replace("_", "-"): str(value) for name, value in changed.items()}
    flags = " ".join(f"--{name}={value}" for name, value in sorted(parameters.items()))
    return f"ray start {'--head ' if head else ''} --block {flags}"
