"""API keys: who is calling."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from serving.errors import InvalidApiKey, MissingApiKey

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pydantic import SecretStr


class Keys:
    """The accepted keys. With none configured any key, or none, is accepted (PROTOCOL 15, no. 13).

    Keys are kept and looked up as SHA-256 digests, so that neither memory nor timing tells one.
    """

    def __init__(self, keys: Sequence[SecretStr]) -> None:
        self._digests = frozenset(_digest(key.get_secret_value()) for key in keys)

    def authenticate(self, headers: Mapping[str, str]) -> str:
        """Return the caller's id: stable for a key, and telling nothing of it.

        Raises `MissingApiKey` or `InvalidApiKey`. `headers` has lower-case names.
        """
        scheme, _, key = headers.get("authorization", "").partition(" ")
        key = key.strip()
        if scheme.lower() != "bearer" or not key:
            if self._digests:
                raise MissingApiKey
            return "anonymous"
        digest = _digest(key)
        if self._digests and digest not in self._digests:
            raise InvalidApiKey
        return digest[:16]


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()
