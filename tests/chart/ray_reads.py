"""How Ray reads what the chart renders, as a process of its own: standard input and output are JSON.

For each name of the input, `cluster` (a RayCluster) and `serve` (Serve's configuration): `nodes`, the kinds of node
that Ray's autoscaler sees, and `wants`, the resources that each deployment of the built application asks for.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.serve.schema import ServeDeploySchema

from serving.cluster.deployments import build


def read(cluster: dict[str, Any], serve: dict[str, Any]) -> dict[str, Any]:
    """One release."""
    (application,) = ServeDeploySchema(**serve).applications
    assert application.import_path == "serving.cluster.deployments:build"
    frontend = build(dict(application.args))._bound_deployment
    wants = {}
    for deployment in [
        frontend,
        *(each._bound_deployment for each in frontend.init_args if hasattr(each, "_bound_deployment")),
    ]:
        config = deployment._replica_config
        options = config.ray_actor_options
        asked = {"CPU": options.get("num_cpus"), "GPU": options.get("num_gpus")} | (options.get("resources") or {})
        (bundle,) = config.placement_group_bundles or [asked]
        assert config.placement_group_bundles is None or bundle == {key: each for key, each in asked.items() if each}
        wants[deployment.name] = {key: each for key, each in bundle.items() if each}
    metadata = {"metadata": {"name": "c", "namespace": "n"}}
    return {
        "nodes": _derive_autoscaling_config_from_ray_cr(metadata | {"spec": cluster})["available_node_types"],
        "wants": wants,
    }


if __name__ == "__main__":
    json.dump({name: read(**each) for name, each in json.load(sys.stdin).items()}, sys.stdout)
