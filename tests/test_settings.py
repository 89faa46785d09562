"""Sources and types of settings."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from pydantic import ValidationError

from serving.config import Settings

if TYPE_CHECKING:
    from pathlib import Path


def test_a_file_is_a_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file `captioner_<name>` is that setting, without its line end; other files are ignored."""
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
    (tmp_path / "captioner_min_frontends").write_text("3")
    (tmp_path / "captioner_min_engine_replicas").write_text("3")
    (tmp_path / "file.toml").write_text(
        "port = 4\nmin_frontends = 4\nmin_engine_replicas = 4\nmax_engine_replicas = 4\n"
    )
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


def test_a_missing_directory_of_secrets_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A forgotten mount does not pass for a directory without secrets."""
    monkeypatch.setenv("CAPTIONER_SECRETS_DIR", str(tmp_path / "forgotten"))
    with pytest.raises(FileNotFoundError, match="forgotten does not exist"):
        Settings.load([])


@pytest.mark.parametrize(
    ("written", "size"),
    [("10MiB", 10 << 20), ("512 KiB", 512 << 10), ("1GiB", 1 << 30), ("1.5GiB", 3 << 29), ("16777216", 1 << 24)],
)
def test_sizes_are_written_with_units(written: str, size: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Flags, variables and the file accept KiB, MiB and GiB as well as plain bytes."""
    assert Settings.load([f"--max-body-bytes={written}"]).max_body_bytes == size
    (tmp_path / "file.toml").write_text(f'max_url_bytes = "{written}"\nmax_upload_bytes = {size}\n')
    monkeypatch.setenv("CAPTIONER_CONFIG", str(tmp_path / "file.toml"))
    monkeypatch.setenv("CAPTIONER_MAX_BODY_BYTES", written)
    settings = Settings.load([])
    assert (settings.max_body_bytes, settings.max_url_bytes, settings.max_upload_bytes) == (size, size, size)


@pytest.mark.parametrize("written", ["10MB", "10 M", "-1MiB", "MiB", "1e3KiB", "0.0001KiB", "10MiB, 5"])
def test_other_sizes_are_refused(written: str) -> None:
    """Decimal units, other words and fractions of a byte are errors, not guesses."""
    with pytest.raises(ValidationError, match="max_body_bytes"):
        Settings(max_body_bytes=written)


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.0.0.2", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),  # noqa: S104
        ("::", False),
        ("10.0.0.1", False),
        ("captions.example.com", False),
    ],
)
def test_loopback_is_one_rule(host: str, *, loopback: bool) -> None:
    """Every loopback address counts as such for `on_loopback` and for switching authentication off."""
    assert Settings(host=host).on_loopback is loopback
    if loopback:
        assert Settings(host=host, auth=False).auth is False
    else:
        with pytest.raises(ValidationError, match="only on a loopback address"):
            Settings(host=host, auth=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"object_store_url": "captions"}, "object_store_url: begins with none of s3://, gs://, az://"),
        ({"object_store_url": "file:///tmp"}, "object_store_url: begins with none of s3://, gs://, az://"),
        ({"object_store_url": "s3://"}, "object_store_url: is not of the form s3://bucket/prefix"),
        ({"object_store_url": "s3://key:hidden@bucket"}, "object_store_url: is not of the form s3://bucket/prefix"),
        ({"object_store_url": "gs://bucket?x=hidden"}, "object_store_url: is not of the form gs://bucket/prefix"),
        ({"object_store_url": "s3://bucket/../hidden"}, "object_store_url: is not of the form s3://bucket/prefix"),
        ({"object_store_url": "s3://bucket/a//hidden"}, "object_store_url: is not of the form s3://bucket/prefix"),
        ({"object_store_endpoint": "http://[hidden"}, "object_store_endpoint: is no origin"),
        ({"object_store_url": "az://account"}, "object_store_url: names no container"),
        ({"object_store_endpoint": "oss-cn-beijing.aliyuncs.com"}, "object_store_endpoint: is no origin"),
        ({"object_store_endpoint": "https://a:hidden@b"}, "object_store_endpoint: is no origin"),
        ({"object_store_virtual_host": True}, "object_store_virtual_host: requires object_store_endpoint"),
        (
            {"object_store_url": "s3://b", "object_store_secret_key": "hidden"},
            "object_store_secret_key: is of use only",
        ),
        ({"object_store_url": "s3://b", "object_store_access_key_id": "k"}, "object_store_secret_key: is of use only"),
    ],
)
def test_wrong_settings_of_a_bucket_are_refused(changes: dict[str, object], message: str) -> None:
    """Each error names the setting and the remedy, and shows no part of a value."""
    with pytest.raises(ValidationError) as refused:
        Settings.model_validate(changes)
    assert message in str(refused.value)
    assert "hidden" not in str(refused.value)


def test_keys_of_a_bucket_are_secrets() -> None:
    """No form of the settings shows them; an Azure container and a bucket of Google need the secret key alone."""
    keys = {"object_store_access_key_id": "hidden-id", "object_store_secret_key": "hidden-key"}
    settings = Settings.model_validate({"object_store_url": "s3://b", **keys})
    assert "hidden" not in repr(settings) + settings.model_dump_json()
    assert keys.items() <= settings.secrets.items()
    for url in ("az://account/container/prefix", "gs://bucket"):
        Settings.model_validate({"object_store_url": url, "object_store_secret_key": "hidden-key"})
