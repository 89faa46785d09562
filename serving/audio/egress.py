"""Egress guard: the hosts that a stranger's URL may make us connect to. Only the public internet, on a few ports.

The guard checks addresses, never spellings: however a host is written, the addresses that it resolves to count.
Sources: PROTOCOL 7.3 and the IANA special-purpose address registries.
"""

from __future__ import annotations

import ipaddress
import logging
import re
import string
from typing import TYPE_CHECKING
from urllib.parse import quote, urlsplit

from yarl import URL

from serving.errors import DownloadFailed, InvalidAudioUrl

if TYPE_CHECKING:
    from collections.abc import Iterable

    from serving.config import Settings

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_GRAPHIC = string.ascii_letters + string.digits + string.punctuation

_PUBLIC_V6 = ipaddress.ip_network("2000::/3")
"""The public IPv6 range. Outside are loopback, IPv4-mapped, NAT64, unique local (cloud metadata), link-local,
multicast."""

_SPECIAL: tuple[Network, ...] = tuple(
    map(
        ipaddress.ip_network,
        (
            "0.0.0.0/8",  # this network
            "10.0.0.0/8",  # private
            "100.64.0.0/10",  # carrier-grade NAT; 100.100.100.200 is Alibaba Cloud's metadata
            "127.0.0.0/8",  # loopback
            "168.63.129.16/32",  # Azure's platform service
            "169.254.0.0/16",  # link-local; 169.254.169.254 is most clouds' metadata
            "172.16.0.0/12",  # private
            "192.0.0.0/24",  # protocol assignments
            "192.0.2.0/24",  # documentation
            "192.31.196.0/24",  # AS112
            "192.52.193.0/24",  # AMT
            "192.88.99.0/24",  # 6to4 relays
            "192.168.0.0/16",  # private
            "192.175.48.0/24",  # AS112
            "198.18.0.0/15",  # benchmarking
            "198.51.100.0/24",  # documentation
            "203.0.113.0/24",  # documentation
            "224.0.0.0/4",  # multicast
            "240.0.0.0/4",  # reserved, and broadcast
            "2001::/23",  # protocol assignments: Teredo, benchmarking, ORCHID
            "2001:db8::/32",  # documentation
            "2002::/16",  # 6to4
            "2620:4f:8000::/48",  # AS112
            "3ffe::/16",  # the former 6bone
            "3fff::/20",  # documentation
        ),
    )
)

log = logging.getLogger(__name__)


def is_public(address: Address) -> bool:
    """Return whether an address is an ordinary one of the public internet."""
    if isinstance(address, ipaddress.IPv6Address) and address not in _PUBLIC_V6:
        return False
    return not any(address in network for network in _SPECIAL)


def parse_url(text: str) -> URL:
    """Parse an http(s) URL, its percent-escapes untouched; only spaces and non-ASCII characters are escaped.

    Raises `InvalidAudioUrl`, also for a URL with a user name or password: we forward no credentials, and the same URL
    without them would be a different resource.
    """
    try:
        parts = urlsplit(text)
        port = parts.port
        if _CONTROL.search(text) or parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
            raise InvalidAudioUrl.because("It needs a host, no control character, and no user name or password.")
        host = URL.build(scheme=parts.scheme, host=parts.hostname).host_subcomponent  # IDNA
        return URL.build(
            scheme=parts.scheme,
            authority=f"{host}:{port}" if port is not None else f"{host}",
            path=quote(parts.path or "/", safe=_GRAPHIC),
            query_string=quote(parts.query, safe=_GRAPHIC),
            encoded=True,
        )
    except ValueError:
        raise InvalidAudioUrl.because("Its host or port is malformed.") from None


class EgressGuard:
    """The decision on a host's addresses. `settings.fetch_allow` admits hosts that would be refused.

    Raises `ValueError` for an entry that is neither a host, a host and port, nor a network.
    """

    def __init__(self, settings: Settings) -> None:
        self._ports = frozenset(settings.fetch_ports)
        self._networks: list[Network] = []
        self._hosts: set[tuple[str, int | None]] = set()
        for entry in settings.fetch_allow:
            try:
                self._networks.append(ipaddress.ip_network(entry, strict=False))
            except ValueError:
                if "/" in entry:
                    raise
                parts = urlsplit(f"//{entry}")
                self._hosts.add((_name(parts.hostname or ""), parts.port))

    def check(self, host: str, port: int, addresses: Iterable[Address]) -> None:
        """Return if the host may be reached at every one of its addresses; raise `DownloadFailed` if not.

        A name that does not resolve and a name that resolves to a forbidden address look the same from outside.
        """
        if not self._hosts.isdisjoint({(_name(host), port), (_name(host), None)}):
            return
        unlisted = [address for address in addresses if not any(address in network for network in self._networks)]
        if not all(map(is_public, unlisted)):
            log.warning("download refused", extra={"host": host, "addresses": list(map(str, unlisted))})
            raise DownloadFailed
        if unlisted and port not in self._ports:
            raise DownloadFailed(f"{DownloadFailed.message} Port {port} is not allowed.")


def _name(host: str) -> str:
    return host.lower().rstrip(".")
