"""Processes of an engine on CUDA hold nothing of the service that started them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.cuda.build import CudaBuild

pytestmark = pytest.mark.timeout(600)


def test_an_engine_holds_no_socket_of_the_service(cuda_build: CudaBuild) -> None:
    """Neither listener nor connections are open in a process of an engine, which outlives a drain of the service."""
    seen = cuda_build.run("inheritance")
    assert seen["processes"] >= 2
    assert seen["holding"] == 0


def test_a_forked_engine_would_hold_them(cuda_build: CudaBuild) -> None:
    """With vLLM's own choice on CUDA, fork, a process of the engine holds them: the test above would notice."""
    assert cuda_build.run("inheritance", fault="fork")["holding"] >= 1
