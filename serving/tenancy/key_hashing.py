"""API keys as secrets: generated at random, stored only as hashes under a pepper."""

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
"""Number of a key's first characters that are shown to identify it; the other 38 stay unknown."""

_RANDOM_BYTES = 32
_MIN_PEPPER_CHARACTERS = 16


def make_key() -> str:
    """Return a new API key of 256 random bits."""
    return f"sk-{secrets.token_urlsafe(_RANDOM_BYTES)}"


class Pepper:
    """The secret under which keys are hashed: without it, the database alone does not allow guesses to be tested."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    @classmethod
    def of(cls, settings: Settings) -> Pepper:
        """Return the pepper of the settings, else of the file `pepper` in `data_dir`, which is created if missing."""
        if settings.key_pepper is not None:
            return cls(settings.key_pepper.get_secret_value().encode())
        return cls(_read_or_create(settings.data_dir / "pepper"))

    @property
    def secret(self) -> str:
        """The secret as text, for processes of this service on other machines."""
        return self._secret.decode()

    @property
    def check(self) -> str:
        """A value that is equal for equal peppers and reveals nothing about them."""
        return self.digest("which pepper is this?")

    def digest(self, key: str) -> str:
        """Return the hash by which a key is stored and found."""
        return hmac.digest(self._secret, key.encode("utf-8", "surrogatepass"), "sha256").hex()


def _read_or_create(path: Path) -> bytes:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not path.exists():
        descriptor, temporary = tempfile.mkstemp(dir=path.parent)  # readable only by its owner
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(_RANDOM_BYTES))
            file.flush()
            os.fsync(descriptor)
        with suppress(FileExistsError):  # another process has created it
            os.link(temporary, path)
        Path(temporary).unlink()
    secret = path.read_bytes().strip()
    if len(secret) < _MIN_PEPPER_CHARACTERS:
        raise ValueError(
            f"{path} is damaged: it must contain the secret under which keys are hashed; restore it from a backup"
        )
    return secret
