"""The tested clients: version, environment, and a process that performs calls with it."""

from __future__ import annotations

import json
import queue
import subprocess
import threading
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import pytest

from tests.sdk.drivers.calls import Call, Outcome, Piece
from tests.sdk.environments import HERE, ROOT, bare_variables, node_environment, python_environment

if TYPE_CHECKING:
    from pathlib import Path

NATIVE, COMPATIBLE = "native", "compatible"


@dataclass(frozen=True)
class Client:
    """One client as a user would hold it. `dialect` is the dialect that it sends."""

    environment: str
    driver: str
    dialect: str
    asynchronous: bool = False
    protocol: str = ""

    @property
    def name(self) -> str:
        """Name in test ids and messages."""
        kind = f"-Client-{self.protocol}" if self.protocol else ""
        return f"{self.environment}{kind}{'-async' if self.asynchronous else ''}"

    @property
    def is_1x(self) -> bool:
        """True for DashScope's 1.x API, which returns errors rather than raising them and never retries."""
        return self.driver == "dashscope_calls"

    @property
    def uploads(self) -> bool:
        """True if the client uploads local files automatically."""
        return self.environment.startswith("dashscope") and self.protocol != "openai"

    def caption(self, outcome: Outcome, stream: str) -> str:
        """Return the caption that the pieces make; without an instruction, a stream of 1.x is cumulative."""
        cumulative = stream == "cumulative" or (stream == "default" and self.is_1x)
        return outcome.pieces[-1].text if cumulative else outcome.text

    @property
    def streams(self) -> tuple[str, ...]:
        """Kinds of streams that the client can request."""
        return ("default", "delta", "cumulative") if self.dialect == NATIVE else ("default",)


_SYNCHRONOUS = [
    Client("dashscope-2.0.2", "dashscope_calls", NATIVE),
    Client("dashscope-1.24.10", "dashscope_calls", NATIVE),
    Client("dashscope-2.0.2", "dashscope_client", NATIVE, protocol="native"),
    Client("dashscope-2.0.2", "dashscope_client", COMPATIBLE, protocol="openai"),
    Client("openai-3.54.0", "openai_chat", COMPATIBLE),
    Client("openai-1.52.2", "openai_chat", COMPATIBLE),
]
CLIENTS = [
    *_SYNCHRONOUS,
    *(replace(client, asynchronous=True) for client in _SYNCHRONOUS),
    Client("openai-npm-7.57.0", "openai_chat.mjs", COMPATIBLE, asynchronous=True),
    Client("openai-npm-4.104.0", "openai_chat.mjs", COMPATIBLE, asynchronous=True),
]

every_way = pytest.mark.parametrize("stream", ["", "default"], ids=["whole", "stream"])
every_client = pytest.mark.parametrize("client", CLIENTS, ids=lambda client: client.name)
every_stream = pytest.mark.parametrize(
    ("client", "stream"),
    [pytest.param(client, stream, id=f"{client.name}-{stream}") for client in CLIENTS for stream in client.streams],
)


class Driver:
    """A process in a client's environment that performs one call after the other. A context."""

    def __init__(self, environment: str, driver: str, workspace: Path) -> None:
        if driver.endswith(".mjs"):
            script = node_script(environment, (HERE / "drivers" / driver).read_text(), workspace / driver)
            command = ["node", str(script)]
        else:
            python = python_environment(environment) / "bin" / "python"
            command = [str(python), "-m", f"tests.sdk.drivers.{driver}"]
        self._name = f"{driver} of {environment}"
        self._log = (workspace / "log").open("w+")
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=bare_variables(workspace), stdin=-1, stdout=-1, stderr=self._log, text=True
        )
        self._outcomes: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            if stream is not None:
                stream.close()

    def perform(self, call: Call) -> Outcome:
        """Perform the call with the client. Raises `RuntimeError` if the driver itself fails."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asdict(call)) + "\n")
        self._process.stdin.flush()
        try:
            line = self._outcomes.get(timeout=call.timeout_s + 60)
        except queue.Empty:
            line = ""
        if not line:
            self._log.seek(0)
            raise RuntimeError(f"{self._name} gave no answer:\n{self._log.read()}")
        values: dict[str, Any] = json.loads(line)
        return Outcome(**values | {"pieces": [Piece(**piece) for piece in values["pieces"]]})

    def kill(self) -> None:
        """Kill the process, as a crash or an impatient user would."""
        self._process.kill()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._outcomes.put(line)
        self._outcomes.put("")


def node_script(environment: str, source: str, path: Path) -> Path:
    """Write a script to the path so that its imports find the environment's packages."""
    path.write_text(source)
    modules = path.parent / "node_modules"
    if not modules.exists():
        modules.symlink_to(node_environment(environment) / "node_modules")
    return path
