"""Access: when a development key is made, how soon changes count, and how secrets are compared."""

from __future__ import annotations

import hmac
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa
from pydantic import SecretStr

from serving.api.admin import _OnlyWithToken
from serving.config import Settings
from serving.observability.scrape_access import has_token
from serving.tenancy import schema
from serving.tenancy.admin.service import Administration
from serving.tenancy.key_hashing import Pepper
from serving.tenancy.keys import Keyring, development_key

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def database() -> Iterator[sa.Engine]:
    """An empty database with tables."""
    engine = sa.create_engine("sqlite://", poolclass=sa.StaticPool, connect_args={"check_same_thread": False})
    schema.metadata.create_all(engine)
    with engine.begin() as connection:
        connection.execute(schema.store_state.insert(), {"id": 1, "revision": 0, "pepper_check": None})
    yield engine
    engine.dispose()


def settings(tmp_path: Path, **changes: Any) -> Settings:
    """Return settings of a service with its data in this directory."""
    return Settings(engine="fake", data_dir=tmp_path, **changes)


def test_a_development_key_is_made_only_where_there_is_no_key(database: sa.Engine, tmp_path: Path) -> None:
    """Keys of the settings, keys of the database and `auth` off leave no development key."""
    assert str(development_key(settings(tmp_path), database)).startswith("sk-")
    assert development_key(settings(tmp_path, api_keys=["sk-one"]), database) is None
    assert development_key(settings(tmp_path, auth=False), database) is None
    administration = Administration(database, Pepper.of(settings(tmp_path)), "test")
    administration.set_plan("free")
    administration.create_tenant("acme", plan="free")
    key, _ = administration.create_key("acme")
    assert development_key(settings(tmp_path), database) is None
    administration.revoke_key(key["id"])
    assert development_key(settings(tmp_path), database) is None


async def test_changes_count_within_the_refresh(database: sa.Engine, tmp_path: Path) -> None:
    """Keys are read again after a second by default, in all processes: the documents promise two."""
    given = settings(tmp_path)
    assert given.key_refresh_s == 1
    assert Keyring(given, database)._refresh_s == 1


def test_secrets_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token is compared by `hmac.compare_digest`, right or wrong, and never by a comparison that ends early."""
    compared: list[tuple[bytes, bytes]] = []
    compare = hmac.compare_digest

    def noted(given: bytes, wanted: bytes) -> bool:
        compared.append((given, wanted))
        return compare(given, wanted)

    monkeypatch.setattr(hmac, "compare_digest", noted)
    token = SecretStr("scrape")
    assert has_token(token, [b"Bearer scrape"])
    assert not has_token(token, [b"Bearer scrapf"])
    assert not has_token(token, [])
    assert not has_token(token, [b"Bearer scrape", b"Bearer scrape"])
    assert compared == [(b"Bearer scrape", b"Bearer scrape"), (b"Bearer scrapf", b"Bearer scrape")]


async def test_the_admin_token_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The administration compares the header of each request by `hmac.compare_digest`, too."""
    compared: list[bytes] = []
    compare = hmac.compare_digest

    def noted(given: bytes, wanted: bytes) -> bool:
        compared.append(given)
        return compare(given, wanted)

    monkeypatch.setattr(hmac, "compare_digest", noted)
    passed: list[str] = []
    answered: list[int] = []

    async def inner(scope: Any, *_: Any) -> None:
        passed.append(scope["path"])

    async def send(message: Any) -> None:
        answered.extend([message["status"]] if "status" in message else [])

    guarded = _OnlyWithToken(inner, "admin")
    for path, fields in (
        ("/plans", [(b"authorization", b"Bearer admin")]),
        ("/keys", [(b"authorization", b"Bearer admim")]),
        ("/keys", []),
        ("/healthz", []),
    ):
        await guarded({"type": "http", "path": path, "method": "GET", "headers": fields}, None, send)  # type: ignore[arg-type]
    assert passed == ["/plans", "/healthz"]
    assert answered == [401, 401]
    assert compared == [b"Bearer admin", b"Bearer admim", b""]
