"""Start and stop of the real engine, and its death."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import subprocess
import sys
from contextlib import aclosing
from typing import TYPE_CHECKING

import psutil
import pytest

from serving.config import Settings
from serving.engine.vllm.engine import VllmEngine, _environment
from serving.errors import EngineFailed, NotReady
from serving.types import Sampling
from tests.engine.conftest import caption, sound, start
from tests.engine.started import files_of, model_of, within

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session")]


@pytest.fixture
def dropped_sockets() -> Iterator[None]:
    """Collect the ZeroMQ context that vLLM leaves when loading fails; the collector warns of it."""
    yield
    gc.collect()


async def test_before_its_start_the_engine_is_not_ready() -> None:
    """Before the start, the health check and captions raise `NotReady`, and stopping does nothing."""
    engine = VllmEngine(Settings())
    with pytest.raises(NotReady):
        await engine.check_health()
    with pytest.raises(NotReady):
        await caption(engine, sound(1))
    await engine.stop()


@pytest.mark.usefixtures("dropped_sockets")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
async def test_a_checkpoint_that_cannot_be_loaded_fails_the_start(tmp_path: Path) -> None:
    """The start raises `EngineFailed`, and the engine can be stopped."""
    (tmp_path / "config.json").write_text("{}")
    engine = VllmEngine(Settings(model=str(tmp_path)))
    with pytest.raises(EngineFailed):
        await start(engine)
    await engine.stop()


@pytest.mark.usefixtures("dropped_sockets")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
async def test_stop_ends_a_start_under_way(engine: VllmEngine) -> None:
    """Stopping during the start ends the loading process and deletes its files; another engine is not affected."""
    before = set(psutil.Process().children(recursive=True))
    late = VllmEngine(Settings())
    starting = asyncio.create_task(start(late))

    async def spawned() -> bool:
        return bool(set(psutil.Process().children(recursive=True)) - before)

    assert await within(60, spawned)
    await late.stop()
    with pytest.raises(EngineFailed):
        await starting
    assert set(psutil.Process().children(recursive=True)) <= before
    assert not files_of(late)
    await engine.check_health()


async def test_an_engine_process_gets_none_of_the_services_variables(tmp_path: Path) -> None:
    """Variables of the service, which may be secrets, are kept out of processes started meanwhile and not lost here.

    vLLM's own processes overwrite the memory from which `/proc` shows their variables, so another process is started.
    """
    assert "CAPTIONER_DATA_DIR" in os.environ
    before = dict(os.environ)
    with _environment(Settings(), tmp_path):
        process = await asyncio.create_subprocess_exec("env", "-0", stdout=subprocess.PIPE)
        printed, _ = await process.communicate()
    variables = dict(line.split("=", 1) for line in printed.decode().split("\0") if line)
    assert variables["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn"
    assert not [name for name in variables if name.startswith("CAPTIONER_")]
    assert dict(os.environ) == before


async def test_the_death_of_the_engine_is_noticed() -> None:
    """Ctrl-C does not reach the engine process; once it is dead, captions and the health check raise `EngineFailed`.

    Before that, steps are counted, although vLLM's own metrics are off.
    """
    engine = VllmEngine(Settings(vllm_metrics=False))
    await start(engine)
    (process,) = model_of(engine)._llm.engine_core.resources.engine_manager.processes
    async with aclosing(engine.generate("dies", sound(1), Sampling(max_tokens=30_000, ignore_eos=True))) as deltas:
        os.kill(process.pid, signal.SIGINT)
        steps = engine.steps
        for _ in range(20):
            await anext(deltas)
        assert engine.steps - steps > 10
        await engine.check_health()
        process.kill()
        with pytest.raises(EngineFailed):
            async for _ in deltas:
                pass
    with pytest.raises(EngineFailed):
        await engine.check_health()
    with pytest.raises(EngineFailed):
        await caption(engine, sound(1))
    await engine.stop()
    assert not psutil.pid_exists(process.pid)
    assert not files_of(engine)


async def test_stopping_fails_running_captions(caplog: pytest.LogCaptureFixture) -> None:
    """A caption in generation raises instead of waiting for ever, and nothing is logged as a failure."""
    engine = VllmEngine(Settings())
    await start(engine)
    logging.getLogger("vllm").addHandler(caplog.handler)
    (process,) = model_of(engine)._llm.engine_core.resources.engine_manager.processes
    async with aclosing(engine.generate("cut", sound(1), Sampling(max_tokens=30_000, ignore_eos=True))) as deltas:
        await anext(deltas)
        stopping = asyncio.create_task(engine.stop())
        with pytest.raises(EngineFailed):
            async for _ in deltas:
                pass
        await stopping
    logging.getLogger("vllm").removeHandler(caplog.handler)
    assert not caplog.records
    assert process.exitcode is not None


async def test_the_engine_ends_with_the_service() -> None:
    """A service that is killed (SIGKILL) leaves no engine process behind."""
    program = """
import asyncio
from serving.config import Settings
from serving.engine.vllm.engine import VllmEngine, _environment

async def main():
    engine = VllmEngine(Settings())
    await engine.start()
    print("ready", flush=True)
    await asyncio.sleep(600)

if __name__ == "__main__":
    asyncio.run(main())
"""
    service = await asyncio.create_subprocess_exec(
        sys.executable, "-W", "ignore", "-c", program, stdout=asyncio.subprocess.PIPE
    )
    assert service.stdout is not None
    assert await service.stdout.readline() == b"ready\n"
    children = psutil.Process(service.pid).children(recursive=True)
    service.kill()
    await service.wait()
    assert children
    _, alive = await asyncio.to_thread(psutil.wait_procs, children, timeout=20)
    assert not alive
