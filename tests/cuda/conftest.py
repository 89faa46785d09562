"""The CUDA build, and its answers about every profile, asked once a session."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.cuda.build import ROOT, CudaBuild
from tests.cuda.table import CASES, Case, key

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture(scope="session")
def cuda_build(tmp_path_factory: pytest.TempPathFactory) -> CudaBuild:
    """The installed CUDA build of vLLM."""
    return CudaBuild(tmp_path_factory.mktemp("cuda"))


@pytest.fixture(scope="session")
def facts_of(cuda_build: CudaBuild) -> Callable[[Case], dict[str, Any]]:
    """Facts of a profile on a number of GPUs; all cases of a kind of GPU are asked at once."""
    found: dict[str, dict[str, Any]] = {}

    def facts_of(case: Case) -> dict[str, Any]:
        if key(case) not in found:
            cases = [each for each in CASES if each.gpu == case.gpu]
            asked = [
                {
                    "profile": str(ROOT / "deploy" / "profiles" / f"{each.profile}.toml"),
                    "checkpoint": str(cuda_build.quantized[each.checkpoint]) if each.checkpoint else "",
                    "changes": {"tensor_parallel": each.tensor_parallel},
                    "build": each.build,
                    "load": each.load,
                }
                for each in cases
            ]
            answers = cuda_build.run("profiles", gpu=case.gpu, checkpoint=str(cuda_build.checkpoint), cases=asked)
            found.update({key(each): answer for each, answer in zip(cases, answers, strict=True)})
        return found[key(case)]

    return facts_of
