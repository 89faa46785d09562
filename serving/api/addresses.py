"""Addresses of peers: their networks, and the customer that an address belongs to."""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

_IPV6_PREFIX = 64
"""Bits of an IPv6 address that are counted as one: one customer has all addresses that share them."""


class Networks:
    """A set of networks, which contains an address written as a text."""

    def __init__(self, networks: Iterable[str]) -> None:
        """Parse networks (`10.0.0.0/8`) and addresses. Raises `ValueError`."""
        self._networks = [ipaddress.ip_network(network, strict=False) for network in networks]

    def __contains__(self, host: object) -> bool:
        address = _address(host) if isinstance(host, str) else None
        return address is not None and any(address in network for network in self._networks)


def is_loopback(host: str) -> bool:
    """Return whether a peer's address is of this machine."""
    address = _address(host)
    return address is not None and address.is_loopback


def customer_of(host: str | None) -> str:
    """Return the name under which connections from an address are counted: the address, of IPv6 its network."""
    address = _address(host or "")
    if isinstance(address, ipaddress.IPv6Address):
        return str(ipaddress.ip_network((int(address) >> _IPV6_PREFIX << _IPV6_PREFIX, _IPV6_PREFIX)))
    return str(address or host)


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address
