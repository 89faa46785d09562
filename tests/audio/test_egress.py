"""Egress guard: reachable addresses, redirects and TLS, against real servers on loopback (`sites.py`)."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import ssl
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest

from serving import errors
from serving.audio import egress, fetch
from serving.audio.fetch import Fetcher
from serving.config import Settings
from tests.audio.sites import BODY, INSIDE, OUTSIDE, Names, Site, fetching, get, redirect, response

if TYPE_CHECKING:
    from pathlib import Path

# Addresses


def words(text: str) -> list[str]:
    """Split a list that is written as text."""
    return text.split()


FORBIDDEN = words("""
    0.0.0.0 0.1.2.3 10.0.0.1 10.255.255.255 100.64.0.1 100.100.100.200 100.127.255.255 127.0.0.1 127.255.255.254
    168.63.129.16 169.254.169.254 169.254.0.1 172.16.0.1 172.31.255.255 192.0.0.1 192.0.0.192 192.0.2.7 192.31.196.1
    192.52.193.1 192.88.99.1 192.168.0.1 192.175.48.1 198.18.0.1 198.19.255.255 198.51.100.1 203.0.113.9 224.0.0.1
    239.255.255.255 240.0.0.1 255.255.255.255 :: ::1 ::7f00:1 ::ffff:127.0.0.1 ::ffff:8.8.8.8 ::ffff:0:127.0.0.1
    64:ff9b::7f00:1 64:ff9b::808:808 64:ff9b:1::a00:1 100::1 100:0:0:1::1 2001::1
    2001:0:4136:e378:8000:63bf:3fff:fdd2 2001:2::1 2001:10::1 2001:20::1 2001:db8::1 2002:7f00:1:: 2002:808:808::1
    2620:4f:8000::1 3ffe::1 3fff::1 4000::1 5f00::1 fc00::1 fd00:ec2::254 fd12:3456::1 fe80::1 fe80::1%1 fec0::1
    ff02::1 ff0e::1
""")
PUBLIC = words("""
    1.1.1.1 8.8.8.8 9.255.255.255 11.0.0.0 100.63.255.255 100.128.0.0 126.255.255.255 128.0.0.0 172.15.255.255
    172.32.0.0 192.0.1.0 192.167.255.255 192.169.0.0 198.17.255.255 198.20.0.0 223.255.255.255 2001:200::1
    2001:4860:4860::8888 2400:cb00::1 2606:4700::1111 2a00:1450:4001::1
""")


@pytest.mark.parametrize("address", FORBIDDEN)
async def test_addresses_that_are_not_public_are_refused(tmp_path: Path, address: str) -> None:
    """A name that resolves to any special-purpose address is refused, without a connection."""
    async with fetching(tmp_path, Names(clips_test=[[address]])) as fetcher:
        with pytest.raises(errors.DownloadFailed) as caught:
            await get(fetcher, "http://clips.test/clip")
    assert str(caught.value) == errors.DownloadFailed.message


@pytest.mark.parametrize("address", PUBLIC)
def test_addresses_next_to_the_special_ones_are_public(address: str) -> None:
    """The guard's networks end where the registries' networks end."""
    assert egress.is_public(ipaddress.ip_address(address))


def test_the_guard_is_no_laxer_than_the_standard_library() -> None:
    """Over a sample of all addresses, none that Python calls non-global is public to the guard."""
    sample: list[egress.Address] = [ipaddress.IPv4Address(number) for number in range(0, 2**32, 2**32 // 30_011)]
    sample += [ipaddress.IPv6Address(number) for number in range(0, 2**128, 2**128 // 30_011)]
    assert not [address for address in sample if egress.is_public(address) and not address.is_global]


ODD = words("""
    http://localhost:{port}/clip http://LOCALHOST:{port}/clip http://localhost.:{port}/clip http://127.1:{port}/clip
    http://2130706433:{port}/clip http://0x7f.1:{port}/clip http://0x7f000001:{port}/clip
    http://0177.0.0.1:{port}/clip http://017700000001:{port}/clip http://127.0.0.1.:{port}/clip
    http://[::1]:{port}/clip http://[::]:{port}/clip http://[::ffff:127.0.0.1]:{port}/clip
    http://[::ffff:7f00:1]:{port}/clip http://[0:0:0:0:0:ffff:127.0.0.1]:{port}/ http://[::127.0.0.1]:{port}/clip
    http://[64:ff9b::7f00:1]:{port}/clip http://[fe80::1%251]:{port}/clip http://0:{port}/clip
    http://0.0.0.0:{port}/clip http://①②⑦.⓪.⓪.①:{port}/clip http://１２７.０.０.１:{port}/clip
    http://127。0。0。1:{port}/clip http://%31%32%37.0.0.1:{port}/clip http://ⓛocalhost:{port}/clip
    http://127.0.0.1:{port}/clip#@127.0.0.2 http://127.0.0.1:{port}/clip?@127.0.0.2 http:\\\\127.0.0.1:{port}/clip
    http://127.0.0.2#@127.0.0.1:{port}/clip http://127.0.0.2\\@127.0.0.1:{port}/clip
    http://[::ffff:0:127.0.0.1]:{port}/
""")  # noqa: RUF001 - the ambiguous characters are the point


@pytest.mark.parametrize("url", ODD)
async def test_our_network_is_not_reached_by_any_spelling(tmp_path: Path, inside: Site, url: str) -> None:
    """Every way to write loopback is refused or does not resolve; the inside is never connected to."""
    changes: dict[str, object] = {"fetch_ports": (80, inside.port)}

    def system(host: str, port: int, **options: Any) -> Any:
        return socket.getaddrinfo(host, port, **options) if "local" in host else Names()(host, port, **options)

    values = {"download_dir": tmp_path, **changes}
    fetcher = Fetcher(Settings.model_validate(values), getaddrinfo=system)
    await fetcher.start()
    with pytest.raises((errors.DownloadFailed, errors.InvalidAudioUrl)):
        await get(fetcher, url.format(port=inside.port))
    await fetcher.stop()


@pytest.mark.parametrize(
    "url",
    """
    ftp://127.0.0.2/clip file:///etc/passwd data:audio/wav;base64,AAAA gopher://127.0.0.2/ //127.0.0.2/clip /clip clip
    http:/127.0.0.2/clip http:///clip http:// http://: http://[::1 http://[]/ http://127.0.0.2:99999/clip
    http://127.0.0.2:port/clip http://127.0.0.2:-1/ http://user@127.0.0.2/clip http://user:pass@127.0.0.2/clip
    http://@127.0.0.2/clip http://127.0.0.2/a\tb http://127.0.0.2/a\nb http://127.0.0.2/\x00 http://127.0.0.2/\x7f
    http://127.0.0.2/\udc80 oss://bucket/clip HTTPX://127.0.0.2/ javascript:alert(1)
    """.replace("\n    ", " ").split(" ")[1:],
)
async def test_anything_but_an_http_url_is_refused(tmp_path: Path, url: str) -> None:
    """Other schemes, malformed URLs, credentials and control characters are the caller's mistake."""
    async with fetching(tmp_path) as fetcher:
        with pytest.raises(errors.InvalidAudioUrl):
            await get(fetcher, url)


async def test_one_forbidden_address_among_many_refuses_the_host(tmp_path: Path, outside: Site, inside: Site) -> None:
    """A name with a public and a private address is refused, in either order."""
    names = Names(a_test=[[OUTSIDE, INSIDE]], b_test=[[INSIDE, OUTSIDE]], c_test=[[OUTSIDE, "::1"]])
    async with fetching(tmp_path, names) as fetcher:
        for name in ("a.test", "b.test", "c.test"):
            with pytest.raises(errors.DownloadFailed):
                await get(fetcher, outside.url(host=name))
    assert outside.connections == 0


async def test_rebinding_gains_nothing(tmp_path: Path, outside: Site, inside: Site) -> None:
    """The name is resolved once per hop, and the connection goes to the address that was checked."""
    names = Names(rebind_test=[[OUTSIDE], [INSIDE]])
    async with fetching(tmp_path, names) as fetcher:
        assert await get(fetcher, outside.url(host="rebind.test")) == BODY
        assert names.questions == ["rebind.test"]
        with pytest.raises(errors.DownloadFailed):
            await get(fetcher, outside.url(host="rebind.test"))


async def test_rebinding_between_hops_gains_nothing(tmp_path: Path, outside: Site, inside: Site) -> None:
    """A redirect to the same name is resolved and checked again."""
    outside.answers["/away"] = redirect(f"http://rebind.test:{inside.port}/clip")
    async with fetching(tmp_path, Names(rebind_test=[[OUTSIDE], [INSIDE]])) as fetcher:
        with pytest.raises(errors.DownloadFailed):
            await get(fetcher, outside.url("/away", host="rebind.test"))


async def test_sockets_connect_to_checked_addresses_only(
    tmp_path: Path, inside: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No connection is made even if aiohttp obtains another address than the guard."""

    async def elsewhere(_: object, host: str, port: int = 0, **__: object) -> list[Any]:
        return [{"hostname": host, "host": INSIDE, "port": port, "family": 2, "proto": 6, "flags": 0}]

    monkeypatch.setattr(fetch._Pinned, "resolve", elsewhere)
    async with fetching(tmp_path, Names(clips_test=[[OUTSIDE]])) as fetcher:
        with pytest.raises(errors.DownloadFailed):
            await get(fetcher, inside.url(host="clips.test"))


def test_ports_are_limited_except_for_allowed_hosts() -> None:
    """A public host is reached on the usual ports only; an allowed host or network on any port, or on the named one."""
    assert Settings().fetch_ports == (80, 443, 8000, 8080, 8443)
    guard = egress.EgressGuard(
        Settings.model_validate(
            {"fetch_allow": "media.internal files.internal:9000 10.1.0.0/16 [fd00::1]:9000 fd11::/16"}
        )
    )
    public, private, allowed = (ipaddress.ip_address(a) for a in ("8.8.8.8", "10.2.0.1", "10.1.0.1"))
    guard.check("example.com", 80, [public])
    with pytest.raises(errors.DownloadFailed, match="Port 22 is not allowed"):
        guard.check("example.com", 22, [public])
    guard.check("example.com", 22, [allowed])
    with pytest.raises(errors.DownloadFailed, match="Port 22"):
        guard.check("example.com", 22, [public, allowed])
    guard.check("media.internal", 22, [private])
    guard.check("Media.Internal.", 22, [private])
    with pytest.raises(errors.DownloadFailed):
        guard.check("not.media.internal", 80, [private])
    guard.check("files.internal", 9000, [private])
    with pytest.raises(errors.DownloadFailed):
        guard.check("files.internal", 80, [private])
    guard.check("fd00::1", 9000, [ipaddress.ip_address("fd00::1")])
    guard.check("example.com", 1, [ipaddress.ip_address("fd11::5")])
    with pytest.raises(errors.DownloadFailed):
        guard.check("example.com", 80, [ipaddress.ip_address("::ffff:10.1.0.1")])
    for mistake in ("10.1.0.0/99", "media.internal/16", "media.internal:port"):
        with pytest.raises(ValueError, match=r"."):
            egress.EgressGuard(Settings.model_validate({"fetch_allow": mistake}))


async def test_a_refusal_reveals_nothing_about_our_network(tmp_path: Path, inside: Site) -> None:
    """Unknown, forbidden and unreachable look alike from outside."""
    unused = socket.create_server((OUTSIDE, 0))
    port = unused.getsockname()[1]
    unused.close()
    messages = set()
    async with fetching(tmp_path, Names(inside_test=[[INSIDE]])) as fetcher:
        for url in (inside.url(host="inside.test"), inside.url(), "http://no.such.test/", f"http://{OUTSIDE}:{port}/"):
            with pytest.raises(errors.DownloadFailed) as caught:
                await get(fetcher, url)
            messages.add(str(caught.value))
            assert caught.value.__cause__ is None
    assert messages == {errors.DownloadFailed.message}


# Redirects


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "303 See Other", "307 Temporary", "308 Permanent"])
async def test_redirects_are_followed(tmp_path: Path, outside: Site, status: str) -> None:
    """Absolute, relative and scheme-relative locations are followed for every redirecting status."""
    outside.answers |= {
        "/a/1": redirect(outside.url("/a/2"), status),
        "/a/2": redirect("3", status),
        "/a/3": redirect(f"//{OUTSIDE}:{outside.port}/a/4", status),
        "/a/4": redirect("/clip", status),
    }
    async with fetching(tmp_path) as fetcher:
        assert await get(fetcher, outside.url("/a/1")) == BODY
    assert len(outside.requests) == 5


async def test_five_redirects_are_followed_and_no_sixth(tmp_path: Path, outside: Site) -> None:
    """A chain ends after five, and a loop with it."""
    outside.answers |= {f"/{number}": redirect(f"/{number - 1}") for number in range(1, 7)} | {"/0": response(BODY)}
    outside.answers["/loop"] = redirect("/loop")
    async with fetching(tmp_path) as fetcher:
        assert await get(fetcher, outside.url("/5")) == BODY
        for path in ("/6", "/loop"):
            with pytest.raises(errors.DownloadFailed, match="more than 5"):
                await get(fetcher, outside.url(path))


async def test_a_redirect_inside_is_refused(tmp_path: Path, outside: Site, inside: Site) -> None:
    """A redirect is checked like the first URL, whatever spelling or scheme it uses."""
    locations = [
        inside.url(),
        f"//{INSIDE}:{inside.port}/clip",
        f"http://2130706433:{inside.port}/clip",
        f"http://[::ffff:127.0.0.1]:{inside.port}/clip",
        "http://169.254.169.254/latest/meta-data/",
        f"http://user:pass@{OUTSIDE}:{outside.port}/clip",
        "file:///etc/passwd",
        "ftp://127.0.0.2/clip",
        "http://[::1",
        "http://127.0.0.2:99999/",
        "",
    ]
    outside.answers |= {f"/{number}": redirect(location) for number, location in enumerate(locations)}
    outside.answers["/none"] = response(b"", "302 Found")
    outside.answers["/latin"] = response(b"", "302 Found").replace(
        b"\r\n\r\n", b"\r\nLocation: http://h/\xe4\xff\r\n\r\n"
    )
    outside.answers["/other"] = response(BODY, "300 Multiple Choices", "Location: /clip")
    async with fetching(tmp_path) as fetcher:
        for path in (*map(str, range(len(locations))), "none", "latin", "other"):
            with pytest.raises((errors.DownloadFailed, errors.InvalidAudioUrl)):
                await get(fetcher, outside.url(f"/{path}"))


@pytest.mark.parametrize(
    ("origin", "location", "allowed"),
    [
        ("http://h/", "https://h/x", True),
        ("https://h/", "https://other/x", True),
        ("https://h/", "//other/x", True),
        ("https://h/", "http://h/x", False),
        ("https://h/", "HTTP://h/x", False),
    ],
)
def test_https_is_not_left_for_http(origin: str, location: str, *, allowed: bool) -> None:
    """A redirect may raise the protection of a download, never lower it."""
    with contextlib.nullcontext() if allowed else pytest.raises(errors.DownloadFailed, match="https to http"):
        assert fetch._next_hop(egress.parse_url(origin), location).scheme == "https"


# TLS

KEY = """-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgulGdecrfiEFoyEXX
CQxWg29PVSEYQKXSLdWoE0qqJRKhRANCAASQYWP9BnmtxyU86sviAHPS0DML81D+
SLfu8VTi6ZTAZk1QovggzlgcL29mclPOjqdnhMKP/coEo1ImTOwXz/7G
-----END PRIVATE KEY-----
"""
CERTIFICATE = """-----BEGIN CERTIFICATE-----
MIIBlzCCAT6gAwIBAgIUUBtczv+7A4XlI23QhoY+DqruAiEwCgYIKoZIzj0EAwIw
FTETMBEGA1UEAwwKY2xpcHMudGVzdDAgFw0yNjExMjIyMDAzNDZaGA8yMTI2MTAy
OTIwMDM0NlowFTETMBEGA1UEAwwKY2xpcHMudGVzdDBZMBMGByqGSM49AgEGCCqG
SM49AwEHA0IABJBhY/0Gea3HJTzqy+IAc9LQMwvzUP5It+7xVOLplMBmTVCi+CDO
WBwvb2ZyU86Op2eEwo/9ygSjUiZM7BfP/sajajBoMB0GA1UdDgQWBBSfCuOj5bbO
zBkcxDNTzapfgvvKBjAfBgNVHSMEGDAWgBSfCuOj5bbOzBkcxDNTzapfgvvKBjAP
BgNVHRMBAf8EBTADAQH/MBUGA1UdEQQOMAyCCmNsaXBzLnRlc3QwCgYIKoZIzj0E
AwIDRwAwRAIgcSk/DBErndpwhq12bpt93WFiYV3YDLvja+7hZzjixHgCIA540QeN
5/laH67m92JSHPeO1Jn+usg6yQj0KzyHxw0U
-----END CERTIFICATE-----
"""
"""Self-signed for clips.test, made for this test and used for nothing else."""


@pytest.mark.parametrize(("trusted", "host"), [(True, "clips.test"), (True, "other.test"), (False, "clips.test")])
async def test_https_is_verified_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, trusted: bool, host: str
) -> None:
    """The certificate must be trusted and name the host, though the connection goes to a pinned address."""
    (tmp_path / "pem").write_text(KEY + CERTIFICATE)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(tmp_path / "pem")
    client = ssl.create_default_context(cadata=CERTIFICATE) if trusted else ssl.create_default_context()
    monkeypatch.setattr(aiohttp.connector, "_SSL_CONTEXT_VERIFIED", client)
    names = Names(clips_test=[[OUTSIDE]], other_test=[[OUTSIDE]])
    site = Site(OUTSIDE, {"/clip": response(BODY)})
    good = trusted and host == "clips.test"
    async with site.running(server), fetching(tmp_path / "downloads", names) as fetcher:
        with contextlib.nullcontext() if good else pytest.raises(errors.DownloadFailed):
            assert await get(fetcher, f"https://{host}:{site.port}/clip") == BODY
    assert len(site.requests) == good
