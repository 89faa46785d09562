"""Secrets as files in a directory, as Docker and Kubernetes hand them to containers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from serving.config import Settings

if TYPE_CHECKING:
    from pathlib import Path


def test_a_file_is_a_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file `captioner_<name>` is that setting, less its line end; other files are somebody else's."""
    (tmp_path / "captioner_upload_secret").write_text("quiet\n")
    (tmp_path / "captioner_api_keys").write_text("one, two\n")
    (tmp_path / "postgres_password").write_text("not ours\n")
    monkeypatch.setenv("CAPTIONER_SECRETS_DIR", str(tmp_path))
    settings = Settings.load([])
    assert settings.upload_secret is not None
    assert settings.upload_secret.get_secret_value() == "quiet"
    assert [key.get_secret_value() for key in settings.api_keys] == ["one", "two"]
    assert "quiet" not in repr(settings)


def test_the_order_of_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A flag comes before a variable, that before a secret, that before the TOML file."""
    (tmp_path / "captioner_port").write_text("3")
    (tmp_path / "captioner_frontends").write_text("3")
    (tmp_path / "captioner_engines").write_text("3")
    (tmp_path / "file.toml").write_text("port = 4\nfronts = 4\nengines = 4\nmax_engines = 4\n")
    monkeypatch.setenv("CAPTIONER_SECRETS_DIR", str(tmp_path))
    monkeypatch.setenv("CAPTIONER_CONFIG", str(tmp_path / "file.toml"))
    monkeypatch.setenv("CAPTIONER_PORT", "2")
    monkeypatch.setenv("CAPTIONER_MIN_FRONTENDS", "2")
    settings = Settings.load(["--port=1"])
    assert (settings.port, settings.min_frontends, settings.min_engine_replicas, settings.max_engine_replicas) == (
        1,
        2,
        3,
        4,
    )


def test_a_directory_that_is_not_there_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mount that was forgotten must not pass for no secrets at all."""
    monkeypatch.setenv("CAPTIONER_SECRETS_DIR", str(tmp_path / "forgotten"))
    with pytest.raises(FileNotFoundError, match="forgotten does not exist"):
        Settings.load([])
