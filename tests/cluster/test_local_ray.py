"""Ports for Ray's own processes."""

from __future__ import annotations

import socket
from contextlib import ExitStack

import pytest

from serving.cluster.local_ray import free_ports


def test_rays_ports_are_out_of_the_way() -> None:
    """Distinct, free, and in no range from which the system or Ray takes ports by itself meanwhile."""
    ports = free_ports(6)
    assert len(set(ports)) == 6
    assert all(31_000 < port < 32_768 for port in ports)  # Serve's replicas end before, Linux' outgoing begin after
    with ExitStack() as stack:
        for port in ports:
            stack.enter_context(socket.socket()).bind(("", port))


def test_without_a_free_port_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rather than start something that cannot run."""

    def refuse(self: socket.socket, address: object) -> None:
        raise OSError

    monkeypatch.setattr(socket.socket, "bind", refuse)
    with pytest.raises(OSError, match="no free port between"):
        free_ports(1)
