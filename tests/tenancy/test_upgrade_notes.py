"""Upgrade notes: the newest version has its section, with every migration and with settings that exist."""

from __future__ import annotations

import re

from serving.config import Settings
from tests.support.language import ROOT

PAGE = (ROOT / "deploy" / "upgrading.md").read_text()
CHANGELOG = (ROOT / "CHANGELOG.md").read_text()
VERSIONS = re.findall(r"^## (\d+\.\d+\.\d+)", CHANGELOG, re.MULTILINE)
NOTES = PAGE.partition("\n## Versions of the service\n")[2].partition("\n## ")[0]


def test_every_version_has_notes() -> None:
    """Each version of the changelog has its section, with what runs, what to do before, and what cannot be undone."""
    sections = re.split(r"^### ", NOTES, flags=re.MULTILINE)[1:]
    assert [section.partition("\n")[0] for section in sections] == VERSIONS
    for section in sections:
        assert all(f"**{word}.**" in section for word in ("Migrations", "Before", "Cannot be undone"))


def test_every_migration_is_named_once() -> None:
    """All migrations but the first have a row; none of them has a way down."""
    files = sorted((ROOT / "serving" / "tenancy" / "migrations" / "versions").glob("m*.py"))
    assert [f"`{file.name[1:5]}`" for file in files[1:]] == re.findall(r"^\| (`\d{4}`) \|", NOTES, re.MULTILINE)
    assert not [file for file in files if "def downgrade" in file.read_text()]


def test_renamed_settings_and_metrics_exist_under_the_new_name_alone() -> None:
    """Each old name is none any more, and each new one is."""
    rows = re.findall(r"^ +\| (`[^|]+`) \| (`[^|]+`) \|$", NOTES, re.MULTILINE)
    pairs = [(re.findall(r"`(\w+)`", old), re.findall(r"`(\w+)`", new)) for old, new in rows]
    settings = [pair for pair in pairs if not pair[0][0].startswith("captioner_")]
    metrics = [pair for pair in pairs if pair not in settings]
    assert (len(settings), len(metrics)) == (11, 4)
    for old, new in settings:
        assert len(old) == len(new)
        assert not set(old) & set(Settings.model_fields)
        assert set(new) <= set(Settings.model_fields)
    table = (ROOT / "deploy" / "observability.md").read_text()
    for old, new in metrics:
        assert not [name for name in old if f"| `{name}` |" in table]
        assert not [name for name in new if f"| `{name}` |" not in table]
