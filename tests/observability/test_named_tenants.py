"""Tenants in metrics as shipped: Compose names them, so that the alert on spending finds the tenant.

The chart's part is in tests/chart/test_monitoring.py.
"""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import pytest
import yaml

from serving.config import Settings
from tests.images.test_compose import COMPOSE, merged
from tests.observability.named_tenants import check_alert, metrics_of, series_of_bill
from tests.observability.test_rules import HERE

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory for the files of the service."""
    monkeypatch.setenv("CAPTIONER_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("CAPTIONER_DATABASE_URL", f"sqlite:///{tmp_path}/captioner.db")
    return tmp_path


@pytest.mark.parametrize("files", [("compose.yaml",), ("compose.yaml", "compose.cpu.yaml")])
def test_compose_names_tenants(
    files: tuple[str, ...],
    clean: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """With the secrets of `secrets.sh` the alert on spending fires, and Prometheus has the token of its scrapes."""
    project = merged(tmp_path_factory, *files)
    captioner, prometheus = (project["services"][name] for name in ("captioner", "prometheus"))
    secrets = clean / "secrets"
    subprocess.run([COMPOSE / "secrets.sh", secrets], check=True, capture_output=True)
    for path in secrets.iterdir():
        if path.name not in captioner["secrets"] or path.name in {"captioner_database_url", "captioner_redis_url"}:
            path.unlink()  # its stores do not run here
    monkeypatch.setenv("CAPTIONER_SECRETS_DIR", str(secrets))
    for name, value in captioner["environment"].items():
        if name.startswith("CAPTIONER_") and name not in {"CAPTIONER_SECRETS_DIR", "CAPTIONER_CONFIG"}:
            monkeypatch.setenv(name, str(value or ""))
    settings = Settings(engine="fake", fetch_allow=[])
    assert settings.metrics_token is not None
    assert settings.metrics_token.get_secret_value() == (secrets / "captioner_metrics_token").read_text().strip()
    check_alert(metrics_of(settings), clean)
    scrape = yaml.safe_load((HERE / "prometheus.yml").read_text())["scrape_configs"][0]["authorization"]
    assert scrape["credentials_file"].removeprefix("/run/secrets/") in prometheus["secrets"]


def test_without_a_token_no_tenant_is_named(clean: Path) -> None:
    """The same service without the token has one label for all tenants: the check above finds that out."""
    metrics = metrics_of(Settings(engine="fake", data_dir=clean))
    assert [series.split('"')[3] for series in series_of_bill(metrics, "acme")] == ["other"] * 3
    with pytest.raises(AssertionError):
        check_alert(metrics, clean)
