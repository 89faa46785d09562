"""Ports of Ray's own processes on one machine."""

from __future__ import annotations

import socket
from contextlib import ExitStack

import pytest

from serving.cluster.local_ray import free_ports


def test_rays_ports_do_not_collide() -> None:
    """Ports are distinct, free, and outside the ranges from which the system and Ray pick ports."""
    ports = free_ports(6)
    assert len(set(ports)) == 6
    assert all(
        31_000 < port < 32_768 for port in ports
    )  # Serve's replicas are below, Linux' outgoing connections above
    with ExitStack() as stack:
        for port in ports:
            stack.enter_context(socket.socket()).bind(("", port))


def test_no_free_port_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """`free_ports` raises `OSError` with the range when no port is free, and Ray is not started."""

    def refuse(self: socket.socket, address: object) -> None:
        raise OSError

    monkeypatch.setattr(socket.socket, "bind", refuse)
    with pytest.raises(OSError, match="no free port between"):
        free_ports(1)
