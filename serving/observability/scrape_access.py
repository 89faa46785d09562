"""Access to metrics: which scrapes are answered on the port that callers reach, and when metrics name tenants.

| Service | Scrapes of callers' port | Tenants |
|---|---|---|
| `metrics_token` | with the token | named |
| `metrics_port` on one machine, no token | refused: that port alone answers | named if it listens on loopback |
| one machine, neither | from this machine and not forwarded | `other` |
| a cluster, no token | refused: HAProxy forwards every request without a mark | `other` |
| a cluster without keys | answered: everybody who reaches it may do everything | one, `anonymous` |

A proxy on the same machine connects from loopback, as a local scraper does. Proxies are recognised by the headers that
they add, by HTTP/1.0 (nginx's default towards a server), and by a `Host` that is not the address of this listener. A
proxy that shows none of these passes scrapes on; tenants are not named there.
"""

from __future__ import annotations

import hmac
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self
from urllib.parse import urlsplit

from serving.config import is_loopback
from serving.errors import AccessDenied, InvalidApiKey

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pydantic import SecretStr
    from starlette.types import Scope

    from serving.config import Settings

_FORWARDING = {
    b"forwarded",
    b"via",
    b"x-real-ip",
    b"x-client-ip",
    b"x-cluster-client-ip",
    b"x-original-forwarded-for",
    b"x-original-host",
    b"true-client-ip",
    b"cf-connecting-ip",
    b"cdn-loop",
}
_FORWARDING_PREFIXES = (b"x-forwarded-", b"x-envoy-")
_HTTP_PORT = 80


@dataclass(frozen=True, slots=True)
class ScrapeAccess:
    """The rule for scrapes of the port that callers reach, by the settings of one process."""

    token: SecretStr | None
    names_tenants: bool
    local: bool
    """Without a token, direct scrapes from this machine are answered."""
    open: bool
    """Without a token, every scrape is answered."""

    @classmethod
    def of(cls, settings: Settings, *, in_cluster: bool) -> Self:
        """Return the rule of a process of a cluster, or of the service on one machine."""
        own_port = settings.metrics_port is not None and not in_cluster
        return cls(
            token=settings.metrics_token,
            names_tenants=settings.metrics_token is not None
            or (own_port and is_loopback(settings.metrics_host))
            or not settings.auth,
            local=not own_port and not in_cluster,
            open=in_cluster and not settings.auth,
        )

    def check(self, scope: Scope) -> None:
        """Raise `InvalidApiKey` for a wrong token, `AccessDenied` for a scrape that is not answered without one."""
        if self.token is not None:
            if not has_token(self.token, [value for name, value in scope["headers"] if name == b"authorization"]):
                raise InvalidApiKey
        elif not (self.open or (self.local and is_direct(scope))):
            raise AccessDenied("Metrics are not served here: set metrics_token, and send it as a bearer token.")


def has_token(token: SecretStr, authorization: Sequence[bytes]) -> bool:
    """Return whether the only `authorization` header is this bearer token, in a time that does not show its content."""
    wanted = f"Bearer {token.get_secret_value()}".encode()
    return len(authorization) == 1 and hmac.compare_digest(authorization[0], wanted)


def is_direct(scope: Scope) -> bool:
    """Return whether a request comes from a process of this machine, and through no proxy that shows itself."""
    client, server = scope.get("client"), scope.get("server")
    names = [name for name, _ in scope["headers"]]
    hosts = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
    return (
        client is not None
        and is_loopback(client[0])
        and scope["http_version"] != "1.0"
        and not any(name in _FORWARDING or name.startswith(_FORWARDING_PREFIXES) for name in names)
        and len(hosts) == 1
        and server is not None
        and _names_listener(hosts[0], server)
    )


def _names_listener(host: str, server: Sequence[str | int | None]) -> bool:
    """Return whether a `host` header is what a client of the listener `server`, an address and a port, sends."""
    try:
        parts = urlsplit(f"//{host}")
        port = parts.port
    except ValueError:
        return False
    name = parts.hostname or ""
    return (is_loopback(name) or name == server[0]) and (port or _HTTP_PORT) == (server[1] or _HTTP_PORT)
