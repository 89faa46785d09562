"""Ray's template of HAProxy's configuration has every line that `serving/cluster/haproxy_wrapper.py` replaces."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from serving.cluster import haproxy_wrapper as haproxy
from tests.cluster.ray_haproxy import render

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("frontend", [0, 30_000])
def test_every_line_to_replace_is_found(tmp_path: Path, frontend: int) -> None:
    """Ray's rendered configuration is recognized, with and without a frontend, and nothing of Ray's answers is left."""
    ray = render(tmp_path, port=8000, metrics=9101, stats=8404, frontend=frontend, fallback=8500).read_text()
    assert ("check backup" in ray) == bool(frontend)
    assert ("server frontend 127.0.0.1:30000 check" in ray) == bool(frontend)
    text = haproxy.with_own_responses(ray)
    for status in (502, 503, 504):
        assert f"http-error status {status} {haproxy.HEADERS} {haproxy.RESPONSE_BODY}" in text
    assert f"http-request return status 503 {haproxy.HEADERS} {haproxy.RESPONSE_BODY}" in text
    assert haproxy.SET_VARIABLES in text
    assert not [left for left in ("errorfile", "check backup", "status 404") if left in text]
    assert ("server frontend 127.0.0.1:30000 check" in text) == bool(frontend)
