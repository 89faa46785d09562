"""Drain of one machine out of a Ray cluster without losing a request: what a pod does before it ends.

Ray marks the node as ending. Serve then starts replacements on other nodes, lets the node's replicas finish what they
have, and stops the node's proxy when its last stream has ended. The only module that imports ray, except
`deployments.py`.

This is the only use of Ray's private client. Ray 2.60 has no public call for any of its three steps:
- the node that was started as an instance (`RAY_CLOUD_INSTANCE_ID`): `ray.nodes()` does not return the instance;
- the drain: `ray drain-node` is hidden, outside Ray's promises of stability, and makes the same private call;
- the actors of a node: `ray.util.state.list_actors` asks the dashboard, which does not run here.
`tests/compat/test_ray.py` asserts every private name, and deploy/upgrading.md says what to do when one is gone.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.core.generated.autoscaler_pb2 import DRAIN_NODE_REASON_PREEMPTION  # type: ignore[attr-defined]
from ray.core.generated.gcs_pb2 import ActorTableData, GcsNodeInfo  # type: ignore[attr-defined]
from ray.exceptions import RayError

log = logging.getLogger(__name__)

_POLL_INTERVAL_S = 1.0
_CALL_TIMEOUT_S = 10.0
_SERVE_ACTORS = ("ServeReplica", "HAProxyManager", "ProxyActor")
"""Prefixes of the class names of actors that must have ended: replicas, and the proxy with the clients' connections."""


async def leave(address: str, instance: str, within_s: float) -> bool:
    """Take the node that was started as `instance` out of the cluster at `address`.

    Return when no actor of Serve runs on the node any more, or after `within_s`; the result is true in the former case.
    A cluster that does not answer is ending, too: there is no other node to go to, and nothing to wait for.
    """
    deadline_s = time.monotonic() + within_s
    try:
        client = await asyncio.to_thread(GcsClient, address=address)
        node_id = await _node_id(client, instance)
        if node_id is None:
            log.warning("no living node of the cluster has this instance id", extra={"instance": instance})
            return False
        await asyncio.to_thread(
            client.drain_node,
            node_id,
            DRAIN_NODE_REASON_PREEMPTION,
            "its pod is ending",
            int((time.time() + within_s) * 1000),
        )
        while remaining := await _serve_actors(client, node_id):
            if time.monotonic() > deadline_s:
                log.warning("drain timed out", extra={"within_s": within_s, "still_running": remaining})
                return False
            await asyncio.sleep(_POLL_INTERVAL_S)
    except (OSError, RuntimeError, RayError) as error:
        log.warning("cluster does not answer", extra={"address": address, "error": type(error).__name__})
        return False
    log.info("node drained: no actor of Serve runs on it")
    return True


async def _node_id(client: Any, instance: str) -> str | None:
    """Return the id of the living node with this instance id."""
    nodes = await asyncio.to_thread(client.get_all_node_info, timeout=_CALL_TIMEOUT_S)
    for node_id, node in nodes.items():
        if node.instance_id == instance and node.state == GcsNodeInfo.ALIVE:
            return str(node_id.hex())
    return None


async def _serve_actors(client: Any, node_id: str) -> list[str]:
    """Return the class names of Serve's actors that are alive on the node."""
    actors = await client.async_get_all_actor_info(timeout=_CALL_TIMEOUT_S)
    return sorted(
        actor.class_name
        for actor in actors.values()
        if actor.state == ActorTableData.ALIVE
        and actor.address.node_id.hex() == node_id
        and actor.class_name.startswith(_SERVE_ACTORS)
    )
