"""The first request of a person at a terminal: its key, for this run alone, and the command to paste."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import sqlalchemy as sa

from serving.cli.first_request import print_first_request, with_development_key
from serving.config import Settings
from serving.errors import InvalidApiKey
from serving.tenancy import database as databases
from serving.tenancy import schema
from serving.tenancy.admin.service import Administration
from serving.tenancy.key_hashing import Pepper
from serving.tenancy.keys import Keyring

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Settings of a person at a terminal, with an empty database."""
    return Settings(engine="fake", log_format="text", data_dir=tmp_path, database_url=f"sqlite:///{tmp_path}/new.db")


async def test_a_key_is_made_for_this_run_alone(settings: Settings) -> None:
    """The key is another one at each start, identifies the tenant `development`, and is stored nowhere."""
    first, second = (with_development_key(settings).development_key for _ in range(2))
    assert first is not None
    assert second is not None
    assert first != second
    assert len(first.get_secret_value()) == 46
    database = databases.open_database(settings)
    with database.connect() as connection:
        assert connection.scalar(sa.select(sa.func.count()).select_from(schema.keys)) == 0
    keys = Keyring(settings.model_copy(update={"development_key": first}), database)
    await keys.start()
    caller = keys.authenticate({"authorization": f"Bearer {first.get_secret_value()}"})
    assert caller.tenant_id == "development"
    with pytest.raises(InvalidApiKey):
        keys.authenticate({"authorization": f"Bearer {second.get_secret_value()}"})
    await keys.stop()
    database.dispose()


def test_no_key_is_made_once_there_is_one(settings: Settings) -> None:
    """A key in the database is enough, also a revoked one: a service that had tenants does not open to a new key."""
    with_development_key(settings)
    database = databases.open_database(settings)
    admin = Administration(database, Pepper.of(settings), "test")
    admin.create_tenant("acme", plan="unlimited")
    shown, _ = admin.create_key("acme")
    assert with_development_key(settings).development_key is None
    admin.revoke_key(shown["id"])
    assert with_development_key(settings).development_key is None
    database.dispose()


@pytest.mark.parametrize("changes", [{"log_format": "json"}, {"auth": False}, {"api_keys": ["sk-of-the-settings"]}])
def test_no_key_is_made_for_services(settings: Settings, changes: dict[str, object]) -> None:
    """Nobody reads the output of a service with JSON logs, and keys of the settings or no authentication are enough."""
    chosen = Settings(**{**settings.model_dump(exclude_unset=True), **changes})
    assert with_development_key(chosen).development_key is None


def test_the_printed_command_has_the_key(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    """The command has the development key, else `YOUR_KEY`, and no header where no key is needed."""
    chosen = with_development_key(settings)
    assert chosen.development_key is not None
    for each, expected in (
        (chosen, chosen.development_key.get_secret_value()),
        (settings, "YOUR_KEY"),
    ):
        print_first_request("http://127.0.0.1:8000", each)
        printed = capsys.readouterr().err
        assert "curl -sS http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' -H " in printed
        assert f" -H 'Authorization: Bearer {expected}' -d @- | python3 -m json.tool\n" in printed
        assert f" caption --url http://127.0.0.1:8000 --key {expected} " in printed
    print_first_request("http://127.0.0.1:8000", settings.model_copy(update={"auth": False}))
    printed = capsys.readouterr().err
    assert "Authorization" not in printed
    assert "--key" not in printed
    print_first_request("http://127.0.0.1:8000", settings.model_copy(update={"log_format": "json"}))
    assert capsys.readouterr().err == ""
