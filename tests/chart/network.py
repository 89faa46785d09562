"""Evaluation of NetworkPolicies by Kubernetes' rules: which connections they allow."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from typing import Any

Rule = dict[str, Any]


@dataclass(frozen=True)
class End:
    """One end of a connection: a pod in a namespace, or an address outside the cluster."""

    labels: dict[str, str] = field(default_factory=dict)
    namespace: str = "captions"
    address: str | None = None


class Network:
    """NetworkPolicies of one namespace."""

    def __init__(self, manifests: list[Rule], namespace: str = "captions") -> None:
        self._policies = [each["spec"] for each in manifests if each["kind"] == "NetworkPolicy"]
        self._namespace = namespace

    def allows(self, source: End, target: End, port: int, protocol: str = "TCP") -> bool:
        """Return whether the source's egress and the target's ingress both allow the connection."""
        outgoing = self._direction_allows(source, target, "Egress", port, protocol)
        return outgoing and self._direction_allows(target, source, "Ingress", port, protocol)

    def _direction_allows(self, subject: End, peer: End, direction: str, port: int, protocol: str) -> bool:
        if subject.address is not None or subject.namespace != self._namespace:
            return True  # not subject to this namespace's policies
        applicable = [
            policy
            for policy in self._policies
            if direction in policy["policyTypes"] and selects(policy["podSelector"], subject.labels)
        ]
        rules = [rule for policy in applicable for rule in policy.get(direction.lower(), [])]
        return not applicable or any(self._matches(rule, peer, direction, port, protocol) for rule in rules)

    def _matches(self, rule: Rule, peer: End, direction: str, port: int, protocol: str) -> bool:
        peers = rule.get("to" if direction == "Egress" else "from", [])
        ports = rule.get("ports", [])
        matches_port = not ports or any(
            each["port"] <= port <= each.get("endPort", each["port"]) and each.get("protocol", "TCP") == protocol
            for each in ports
        )
        return matches_port and (not peers or any(self._selects(each, peer) for each in peers))

    def _selects(self, rule: Rule, peer: End) -> bool:
        if block := rule.get("ipBlock"):
            if peer.address is None:
                return False
            address = ipaddress.ip_address(peer.address)
            inside = address in ipaddress.ip_network(block["cidr"])
            return inside and not any(address in ipaddress.ip_network(each) for each in block.get("except", []))
        if peer.address is not None:
            return False
        if (namespaces := rule.get("namespaceSelector")) is not None:
            if not selects(namespaces, {"kubernetes.io/metadata.name": peer.namespace}):
                return False
        elif peer.namespace != self._namespace:
            return False
        return selects(rule.get("podSelector", {}), peer.labels)


def selects(selector: Rule, labels: dict[str, str]) -> bool:
    """Return whether a label selector matches these labels."""
    exact = all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())
    for each in selector.get("matchExpressions", []):
        assert each["operator"] == "In"
        exact = exact and labels.get(each["key"]) in each["values"]
    return exact
