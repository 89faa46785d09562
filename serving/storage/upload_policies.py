"""Upload policies: signed terms under which a client may upload files for a few minutes (PROTOCOL 6.1).

A policy allows its holder to store files under one directory of keys, for `settings.upload_policy_ttl_s`. The files can
be used only by the caller and for the model that the policy was issued to.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import re
import secrets
import time
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from serving.errors import KeyNotAllowed, PolicyExpired, PolicyInvalid

if TYPE_CHECKING:
    from serving.config import Settings

_FILE_NAME = re.compile(r"[^/\\\x00-\x1f\x7f]+")
_KEY_BYTES = 1023
"""Longest key of an object store."""


@dataclass(frozen=True, slots=True)
class UploadPolicy:
    """The data with which a client uploads: it sends `policy` and `signature` with a key below `upload_dir`."""

    policy: str
    signature: str
    upload_dir: str
    expires_in_s: int
    max_bytes: int


@dataclass(frozen=True, slots=True)
class UploadGrant:
    """The right to store one file of at most `max_bytes`, for its owner to use with one model.

    `key_id` names the API key with which the policy was asked for.
    """

    key: str
    owner: str
    model: str
    max_bytes: int
    key_id: str = ""


class UploadPolicies:
    """Issuer and verifier of policies. Replicas with the same secret accept each other's policies."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        secret = settings.upload_secret
        self._secret = secret.get_secret_value().encode() if secret else secrets.token_bytes(32)

    def issue(self, owner: str, model: str, key_id: str = "") -> UploadPolicy:
        settings, now = self._settings, time.time()
        day = f"{datetime.fromtimestamp(now, UTC):%Y-%m-%d}"
        upload_dir = f"dashscope-instant/{owner_digest(owner)}/{day}/{uuid.uuid4()}"
        terms = {
            "expires": now + settings.upload_policy_ttl_s,
            "upload_dir": upload_dir,
            "owner": owner,
            "model": model,
            "key_id": key_id,
            "max_bytes": settings.max_upload_bytes,
        }
        policy = base64.b64encode(json.dumps(terms).encode()).decode()
        return UploadPolicy(
            policy, self._sign(policy), upload_dir, settings.upload_policy_ttl_s, settings.max_upload_bytes
        )

    def check(self, *, policy: str, signature: str, key: str) -> UploadGrant:
        if not hmac.compare_digest(self._sign(policy).encode(), signature.encode(errors="replace")):
            raise PolicyInvalid
        terms = json.loads(base64.b64decode(policy))
        if time.time() >= terms["expires"]:
            raise PolicyExpired
        directory, _, name = key.rpartition("/")
        if directory != terms["upload_dir"] or not _FILE_NAME.fullmatch(name) or name in (".", ".."):
            raise KeyNotAllowed
        if len(key.encode(errors="surrogatepass")) > _KEY_BYTES:
            raise KeyNotAllowed
        return UploadGrant(key, terms["owner"], terms["model"], terms["max_bytes"], terms.get("key_id", ""))

    def _sign(self, policy: str) -> str:
        digest = hmac.digest(self._secret, policy.encode(errors="surrogatepass"), "sha256")
        return base64.b64encode(digest).decode()


def owner_digest(owner: str) -> str:
    """Return the name under which an owner's files are kept and counted: it reveals nothing of the owner."""
    return hashlib.sha256(owner.encode()).hexdigest()[:32]
