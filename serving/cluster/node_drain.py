"""How one machine leaves a Ray cluster without losing a request: what a pod does before it ends.

Ray is told that the node is ending. Serve then starts replacements elsewhere, lets the node's replicas end what they
have, and ends the node's proxy when its last stream has ended. Beside `cluster.py` the only file that imports ray.
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

_ASK_EVERY_S = 1.0
_ANSWER_S = 10.0
_SERVING = ("ServeReplica", "HAProxyManager", "ProxyActor")
"""What must have ended: replicas, and the proxy that holds the clients' connections."""


async def leave(address: str, instance: str, within_s: float) -> bool:
    """Take the node that was started as `instance` out of the cluster at `address`.

    Returns when nothing of Serve runs on it any more, or after `within_s`; whether it is the former. A cluster that
    does not answer is ending itself: then there is nowhere to go and nothing to wait for.
    """
    deadline = time.monotonic() + within_s
    try:
        client = await asyncio.to_thread(GcsClient, address=address)
        node_id = await _node(client, instance)
        if node_id is None:
            log.warning("no living node of the cluster was started as %s", instance)
            return False
        await asyncio.to_thread(
            client.drain_node,
            node_id,
            DRAIN_NODE_REASON_PREEMPTION,
            "its pod is ending",
            int((time.time() + within_s) * 1000),
        )
        while remaining := await _serving(client, node_id):
            if time.monotonic() > deadline:
                log.warning("still running after %g s: %s", within_s, ", ".join(remaining))
                return False
            await asyncio.sleep(_ASK_EVERY_S)
    except (OSError, RuntimeError, RayError) as error:
        log.warning("the cluster does not answer: %s", type(error).__name__)
        return False
    log.info("nothing is served from here any more")
    return True


async def _node(client: Any, instance: str) -> str | None:
    """Return the id of the living node with this instance's name."""
    nodes = await asyncio.to_thread(client.get_all_node_info, timeout=_ANSWER_S)
    for node_id, node in nodes.items():
        if node.instance_id == instance and node.state == GcsNodeInfo.ALIVE:
            return str(node_id.hex())
    return None


async def _serving(client: Any, node_id: str) -> list[str]:
    """Return the names of Serve's actors that still live on the node."""
    actors = await client.async_get_all_actor_info(timeout=_ANSWER_S)
    return sorted(
        actor.class_name
        for actor in actors.values()
        if actor.state == ActorTableData.ALIVE
        and actor.address.node_id.hex() == node_id
        and actor.class_name.startswith(_SERVING)
    )
