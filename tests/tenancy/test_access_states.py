"""Access by key in one process: each state of a tenant and a key, and the holder of a signed policy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from serving.config import Settings
from serving.errors import AccessDenied, Arrearage, CaptionerError, InvalidApiKey, MissingApiKey
from serving.tenancy import database as databases
from serving.tenancy.admin.service import Administration
from serving.tenancy.key_hashing import Pepper
from serving.tenancy.keys import Keyring

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("region", "state", "error"),
    [
        ("beijing", "active", None),
        ("beijing", "suspended", AccessDenied),
        ("beijing", "arrears", Arrearage),
        ("singapore", "active", InvalidApiKey),
    ],
)
async def test_a_key_is_worth_what_its_tenant_is(
    tmp_path: Path, region: str, state: str, error: type[CaptionerError] | None
) -> None:
    """Key and signed policy of a tenant are accepted or refused alike, by its state and region; never for another."""
    settings = Settings(
        engine="fake", region="beijing", data_dir=tmp_path, database_url=f"sqlite:///{tmp_path}/access.db"
    )
    database = databases.open_database(settings)
    databases.migrate(database)
    admin = Administration(database, Pepper.of(settings), "test")
    admin.create_tenant("acme", plan="unlimited", region=region, state=state)
    shown, secret = admin.create_key("acme")
    keys = Keyring(settings, database)
    await keys.start()
    try:
        if error is None:
            assert keys.authenticate({"authorization": f"Bearer {secret}"}).key_id == shown["id"]
            assert keys.holder("acme", shown["id"]).tenant_id == "acme"
        else:
            with pytest.raises(error):
                keys.authenticate({"authorization": f"Bearer {secret}"})
            with pytest.raises(error):
                keys.holder("acme", shown["id"])
        with pytest.raises(MissingApiKey):
            keys.authenticate({})
        with pytest.raises(CaptionerError):
            keys.holder("another", shown["id"])
    finally:
        await keys.stop()
        database.dispose()
