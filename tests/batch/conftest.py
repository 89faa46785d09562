"""Fixtures of the tests of batches."""

from __future__ import annotations

import pytest

from serving.batch import job, line, runner


@pytest.fixture
def hurried_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """A runner that looks, renews and tries again many times as often, so that tests wait for conditions."""
    monkeypatch.setattr(line, "_RETRY_S", 0.05)
    monkeypatch.setattr(line, "_COMMIT_RETRY_S", 0.05)
    monkeypatch.setattr(runner, "_RENEW_S", 0.1)
    monkeypatch.setattr(runner, "_CLAIM_S", 0.1)
    monkeypatch.setattr(job, "_LOOK_EVERY_S", 0.1)
    monkeypatch.setattr(job, "_GRACE_S", 0.5)
