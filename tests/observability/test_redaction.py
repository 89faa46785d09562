"""Redaction: each kind of secret is hidden in each kind of line, and what is no secret stays."""

from __future__ import annotations

import json
import logging
import time

import pytest

from serving.observability.logging import JsonFormatter, TextFormatter
from serving.observability.redaction import redact

S = "hunTer2-Zm9v"
"""The secret of every row."""
BASE64 = "aHVuVGVyMi1abTl2Omh1blRlcjItWm05dg=="
JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.c2lnbmF0dXJl"

TABLE = [
    # Queries
    (f"GET https://a.example/b?jwt={S}&x=1", "GET https://a.example/b?jwt=[redacted]&x=1"),
    (f"https://a.example/b?x=1&auth={S}", "https://a.example/b?x=1&auth=[redacted]"),
    (f"https://a.example/b?x-auth={S}#top", "https://a.example/b?x-auth=[redacted]"),
    (f"https://a.example/cb?code={S}&state=1", "https://a.example/cb?code=[redacted]&state=1"),
    (f"code={S}&grant_type=authorization_code", "code=[redacted]&grant_type=authorization_code"),
    (f"auth={S}", "auth=[redacted]"),
    (f"https://a.blob.example/c?sv=1&sig={S}%3D&se=2", "https://a.blob.example/c?sv=1&sig=[redacted]&se=2"),
    (f"https://a.example/b?key={S}", "https://a.example/b?key=[redacted]"),
    (
        f"https://a.example/b?API_KEY={S}&access_token={S}",
        "https://a.example/b?API_KEY=[redacted]&access_token=[redacted]",
    ),
    (f"https://a.example/b?x=1&amp;sid={S}", "https://a.example/b?x=1&amp;sid=[redacted]"),
    (f"https://a.example/#access_token={S}&x=1", "https://a.example/#access_token=[redacted]&x=1"),
    # Signed URLs of object stores
    (
        f"https://s3.example/a?X-Amz-Credential={S}%2Fs3&X-Amz-Date=1&X-Amz-Security-Token={S}&X-Amz-Signature={S}",
        (
            "https://s3.example/a?X-Amz-Credential=[redacted]&X-Amz-Date=1&X-Amz-Security-Token=[redacted]"
            "&X-Amz-Signature=[redacted]"
        ),
    ),
    (
        f"https://b.oss.example/a?Expires=1&OSSAccessKeyId={S}&Signature={S}%3D&security-token={S}",
        "https://b.oss.example/a?Expires=1&OSSAccessKeyId=[redacted]&Signature=[redacted]&security-token=[redacted]",
    ),
    (
        f"https://b.oss.example/a?x-oss-credential={S}&x-oss-signature={S}&x-oss-security-token={S}",
        "https://b.oss.example/a?x-oss-credential=[redacted]&x-oss-signature=[redacted]&x-oss-security-token=[redacted]",
    ),
    (
        f"https://g.example/a?GoogleAccessId={S}&X-Goog-Signature={S}",
        "https://g.example/a?GoogleAccessId=[redacted]&X-Goog-Signature=[redacted]",
    ),
    (f"https://c.example/a?Policy={S}&Key-Pair-Id={S}", "https://c.example/a?Policy=[redacted]&Key-Pair-Id=[redacted]"),
    # A URL within a URL
    (
        f"r=https%3A%2F%2Fa.example%2Fb%3Ftoken%3D{S}%26x%3D1",
        "r=https%3A%2F%2Fa.example%2Fb%3Ftoken%3D[redacted]%26x%3D1",
    ),
    (f"r=https%3A%2F%2Fu%3A{S}%40a.example", "r=https%3A%2F%2F[redacted]%40a.example"),
    # User name and password
    (f"https://user:{S}@a.example/b", "https://[redacted]@a.example/b"),
    (f"https://{S}@a.example/b", "https://[redacted]@a.example/b"),
    (f"postgresql+psycopg://ledger:p@{S}@db/ledger", "postgresql+psycopg://[redacted]@db/ledger"),
    (f"redis://:{S}@cache:6379/0", "redis://[redacted]@cache:6379/0"),
    # Headers
    (f"Authorization: Basic {BASE64}", "Authorization: [redacted]"),
    (f"refused Basic {BASE64} twice", "refused Basic [redacted] twice"),
    (f"refused bearer {S}", "refused bearer [redacted]"),
    (f"authorization=Digest username=a, response={S}", "authorization=[redacted]"),
    (f"Proxy-Authorization: Negotiate {S}", "Proxy-Authorization: [redacted]"),
    (f"Authorization: AWS4-HMAC-SHA256 Credential={S}/s3, Signature={S}", "Authorization: [redacted]"),
    (f"x-api-key: {S}", "x-api-key: [redacted]"),
    (f"X-DashScope-Api-Key:{S}", "X-DashScope-Api-Key:[redacted]"),
    (f"Cookie: a={S}; b={S}", "Cookie: [redacted]"),
    (f"set-cookie: sid={S}; Path=/; HttpOnly", "set-cookie: [redacted]"),
    (f"{{'Cookie': 'a={S}; b={S}', 'n': 1}}", "{'Cookie': '[redacted]', 'n': 1}"),
    (f"[(b'authorization', b'Token {S}'), (b'n', b'1')]", "[(b'authorization', b'[redacted]'), (b'n', b'1')]"),
    (f"{{'authorization': ['Token {S}']}}", "{'authorization': ['[redacted]']}"),
    # Names and values
    (f"api_key={S} n=1", "api_key=[redacted] n=1"),
    (f'{{"refresh_token": "{S}", "n": 1}}', '{"refresh_token": "[redacted]", "n": 1}'),
    (f'{{"password":"two {S}"}}', '{"password":"[redacted]"}'),
    (f"client_secret = {S}, n=1", "client_secret = [redacted], n=1"),
    (f"host=db password={S} user=a", "host=db password=[redacted] user=a"),
    # By their form
    (f"refused {JWT} twice", "refused [redacted] twice"),
    (f"refused sk-{S}", "refused [redacted]"),
]

UNCHANGED = [
    "code=stop outcome=finished output_tokens=24",
    "tokens: 24, max_num_batched_tokens=8192, tokenizer=None, status_code=200",
    "basic authentication is not supported",
    "https://media.example:8443/a/b.mp3?page=2&codec=mp3&author=a",
    "mail to a@b.example, or see https://b.example/@a",
    "the signature of the policy is wrong",
    "no cookie and no authorization was sent",
    "key_id k_1a2b of tenant acme",
]


@pytest.mark.parametrize(("text", "expected"), TABLE, ids=[str(number) for number in range(len(TABLE))])
def test_secrets_are_hidden(text: str, expected: str) -> None:
    """The secret is replaced, its name and the rest of the line stay; a second pass changes nothing."""
    assert redact(text) == expected
    assert redact(expected) == expected


@pytest.mark.parametrize(("text", "expected"), TABLE, ids=[str(number) for number in range(len(TABLE))])
@pytest.mark.parametrize("formatter", [JsonFormatter(), TextFormatter()], ids=["json", "text"])
def test_secrets_are_hidden_in_every_part_of_a_line(text: str, expected: str, formatter: logging.Formatter) -> None:
    """Message, fields and nested fields of a line have no secret, and JSON stays JSON."""
    fields = {"msg": "refused: %s", "args": (text,), "url": text, "nested": {"a": [text]}, "count": 3}
    line = formatter.format(logging.makeLogRecord(fields))
    assert not [secret for secret in (S, BASE64[:8], JWT[:8]) if secret in line]
    if isinstance(formatter, JsonFormatter):
        found = json.loads(line)
        assert (found["url"], found["nested"], found["count"]) == (expected, {"a": [expected]}, 3)


@pytest.mark.parametrize("text", UNCHANGED)
def test_other_text_stays(text: str) -> None:
    """Words that only look like names of secrets, and our own fields, stay."""
    assert redact(text) == text


def test_named_fields_are_hidden() -> None:
    """A field whose name is that of a secret is hidden whatever its value is."""
    fields = {"authorization": f"Token {S}", "cookie": f"a={S}", "api_key": S, "access_token": S}
    line = JsonFormatter().format(logging.makeLogRecord({"msg": "m"} | fields))
    assert {json.loads(line)[name] for name in fields} == {"[redacted]"}


@pytest.mark.parametrize(
    "part",
    [
        "a-",
        "cookie ",
        "cookie\\",
        "token ",
        'token"',
        "token\\",
        "&a-",
        "://a",
        "%3A%2F%2Fa",
        "basic a ",
        "eyJ",
        "data:",
    ],
)
def test_no_line_takes_long(part: str) -> None:
    """Time grows with the length of a line, not with its square: a client cannot hold the event loop by it."""

    def cost_s(length: int) -> float:
        text = part * (length // len(part))
        started = time.thread_time()
        redact(text)
        return time.thread_time() - started

    assert cost_s(320_000) < 20 * max(cost_s(40_000), 0.005)
