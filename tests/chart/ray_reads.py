"""Program that reads the chart's manifests with Ray's code and prints the result. Input and output are JSON.

Input, by name: `cluster` (a RayCluster) and `serve` (Serve's configuration). Output, by name: `nodes`, the node types
that Ray's autoscaler sees, and `requested`, the resources that each deployment of the built application requests.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.serve.schema import ServeDeploySchema

from serving.cluster.deployments import build


def read(cluster: dict[str, Any], serve: dict[str, Any]) -> dict[str, Any]:
    """Return node types and requested resources of one release."""
    (application,) = ServeDeploySchema(**serve).applications
    assert application.import_path == "serving.cluster.deployments:build"
    frontend = build(dict(application.args))._bound_deployment
    requested = {}
    for deployment in [
        frontend,
        *(each._bound_deployment for each in frontend.init_args if hasattr(each, "_bound_deployment")),
    ]:
        config = deployment._replica_config
        options = config.ray_actor_options
        resources = {"CPU": options.get("num_cpus"), "GPU": options.get("num_gpus")} | (options.get("resources") or {})
        (bundle,) = config.placement_group_bundles or [resources]
        assert config.placement_group_bundles is None or bundle == {
            key: each for key, each in resources.items() if each
        }
        requested[deployment.name] = {key: each for key, each in bundle.items() if each}
    metadata = {"metadata": {"name": "c", "namespace": "n"}}
    return {
        "nodes": _derive_autoscaling_config_from_ray_cr(metadata | {"spec": cluster})["available_node_types"],
        "requested": requested,
    }


if __name__ == "__main__":
    json.dump({name: read(**each) for name, each in json.load(sys.stdin).items()}, sys.stdout)
