"""API keys as secrets: made at random, kept only as hashes under a pepper."""

from __future__ import annotations

import hmac
import os
import secrets
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from serving.config import Settings

PREFIX_CHARACTERS = 8
"""Of a key, shown to tell it from others; the other 38 stay unknown."""

_RANDOM_BYTES = 32
_LEAST_PEPPER_CHARACTERS = 16


def make_key() -> str:
    """A new API key: 256 random bits."""
    return f"sk-{secrets.token_urlsafe(_RANDOM_BYTES)}"


class Pepper:
    """The secret under which keys are hashed: whoever has the database alone can test no guess."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    @classmethod
    def of(cls, settings: Settings) -> Pepper:
        """The setting, or else what a file in the data directory holds, which is made if need be."""
        if settings.key_pepper is not None:
            return cls(settings.key_pepper.get_secret_value().encode())
        return cls(_file(settings.data_dir / "pepper"))

    @property
    def secret(self) -> str:
        """For processes of this service elsewhere."""
        return self._secret.decode()

    @property
    def check(self) -> str:
        """Equal for equal peppers, and telling nothing of them."""
        return self.digest("which pepper is this?")

    def digest(self, key: str) -> str:
        """The hash by which a key is kept and found."""
        return hmac.digest(self._secret, key.encode("utf-8", "surrogatepass"), "sha256").hex()


def _file(path: Path) -> bytes:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not path.exists():
        descriptor, temporary = tempfile.mkstemp(dir=path.parent)  # readable for its owner alone
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(_RANDOM_BYTES))
            file.flush()
            os.fsync(descriptor)
        with suppress(FileExistsError):  # another process was first
            os.link(temporary, path)
        Path(temporary).unlink()
    secret = path.read_bytes().strip()
    if len(secret) < _LEAST_PEPPER_CHARACTERS:
        raise ValueError(f"{path} is damaged: it should hold the secret with which keys are hashed")
    return secret
