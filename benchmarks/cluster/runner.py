"""A cluster on this machine, and callers that load it: for updates.py, chaos.py and autoscaling.py.

It is started as a user would start it (`captioner cluster`, or `ray start` and `serve deploy`), with ports and
directories of its own beside any other.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import psutil

if TYPE_CHECKING:
    from collections.abc import Sequence

KINDS = {
    "engine": "ray::ServeReplica:captioner:engine",
    "frontend": "ray::ServeReplica:captioner:frontend",
    "directory": "ray::ServeReplica:captioner:directory",
    "controller": "ray::ServeController",
    "proxy manager": "ray::HAProxyManager",
    "proxy": "ray::ProxyActor",
    "haproxy": "/haproxy ",
    "audio worker": "serving.audio.worker",
    "idle worker": "ray::IDLE",
    "raylet": "/raylet/raylet ",
    "head (GCS)": "/gcs_server ",
}
"""Processes by a sign in their command line."""

OUTCOMES = ("answered", "told", "proxied", "lost", "abandoned", "defect")
"""See cluster_users.py."""

BIN = Path(sys.executable).parent


class Cluster:
    """A command that brings up a cluster, and all processes that came of it. A context."""

    def __init__(self, command: Sequence[str], directory: Path, port: int, environment: dict[str, str]) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.directory = directory
        self._command = command
        self.mark = f"BENCHMARK_CLUSTER={secrets.token_hex(8)}"
        name, _, value = self.mark.partition("=")
        self.environment = os.environ | {
            name: value,
            "CAPTIONER_UPLOADS_DIR": str(directory / "uploads"),
            "CAPTIONER_DATA_DIR": str(directory / "data"),
            "CAPTIONER_UPLOAD_SECRET": secrets.token_hex(),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(),
            "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(32_000 + port % 10 * 300),
            "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(32_299 + port % 10 * 300),
            # Ray runs its workers at 15, where on a busy machine they would not get a turn.
            "RAY_worker_niceness": "0",
            "RAY_SERVE_HAPROXY_METRICS_PORT": str(port + 1),
            "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(port + 3),
            "RAY_SERVE_HAPROXY_STATS_PORT": str(port + 2),
            **environment,
        }

    def __enter__(self) -> Self:
        with (self.directory / "cluster.log").open("w") as log:
            self.process = subprocess.Popen(
                self._command, env=self.environment, stdout=log, stderr=log, start_new_session=True
            )
        return self

    def __exit__(self, *exc_info: object) -> None:
        """End it as an operator would, and then whatever is left of it."""
        self.process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(60)
        for process in self.members():
            with suppress(psutil.Error):
                process.kill()

    def members(self) -> list[psutil.Process]:
        """Every process that inherited our mark."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                if self.mark.encode() in Path(f"/proc/{process.pid}/environ").read_bytes():
                    found.append(process)
        return found

    def processes(self) -> dict[str, list[psutil.Process]]:
        """The living ones by kind."""
        found: dict[str, list[psutil.Process]] = {kind: [] for kind in KINDS}
        for process in self.members():
            with suppress(psutil.Error):
                command = " ".join(process.cmdline())
                for kind, sign in KINDS.items():
                    if sign in command and process.status() != psutil.STATUS_ZOMBIE:
                        found[kind].append(process)
                        break
        return found

    def counts(self) -> Counter[str]:
        """How many there are of each kind."""
        return Counter({kind: len(processes) for kind, processes in self.processes().items()})

    def ready(self) -> bool:
        """Whether captions can be made now."""
        return self.get("/readyz") == 200

    def get(self, path: str) -> int:
        """The status of a GET; 0 without an answer."""
        try:
            with urllib.request.urlopen(self.url + path, timeout=5) as response:  # noqa: S310 - of ours
                return int(response.status)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0

    def wait_ready(self, timeout_s: float = 400) -> float:
        """Wait until it is ready; return how long that took. Raises `TimeoutError`, `RuntimeError` if it has ended."""
        began = time.monotonic()
        while not self.ready():
            if self.process.poll() is not None:
                raise RuntimeError((self.directory / "cluster.log").read_text()[-3000:])
            if time.monotonic() - began > timeout_s:
                raise TimeoutError((self.directory / "cluster.log").read_text()[-3000:])
            time.sleep(0.5)
        return time.monotonic() - began


class Callers:
    """Locust with our users, in a process of its own. A context: it is told to end and finishes what it has asked."""

    def __init__(
        self, cluster: Cluster, users: int, *, max_pause_s: float, tokens: int, name: str = "outcomes"
    ) -> None:
        self.journal = cluster.directory / f"{name}.jsonl"
        self.journal.unlink(missing_ok=True)
        self._command = [str(BIN / "locust"), "--headless", "-f", str(Path(__file__).with_name("cluster_users.py"))]
        self._command += ["--host", cluster.url, "-u", str(users), "-r", str(users), "--stop-timeout", "200"]
        self._command += ["--only-summary", "--csv", str(cluster.directory / name)]
        self._environment = os.environ | {
            "OUTCOMES": str(self.journal),
            "MAX_PAUSE_S": str(max_pause_s),
            "FAKE_TOKENS": str(tokens),
        }
        self._log = cluster.directory / f"{name}.log"

    def __enter__(self) -> Self:
        with self._log.open("w") as log:
            self.process = subprocess.Popen(self._command, env=self._environment, stdout=log, stderr=log)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(300)

    def endings(self) -> list[dict[str, Any]]:
        """What is known so far, without the requests that were only sent."""
        return [line for line in self._lines() if "ended" in line]

    def account(self) -> dict[str, Any]:
        """Add everything up. Of what does not add up, or was answered twice or as another, `defects` has the first."""
        lines = self._lines()
        sent = [line["sent"] for line in lines if "sent" in line]
        endings = [line for line in lines if "ended" in line]
        answered = [ending for ending in endings if ending["outcome"] == "answered"]
        captions = Counter((ending["clip"], ending["text"], ending["audio_tokens"]) for ending in answered)
        request_ids = Counter(ending["request_id"] for ending in endings if ending["request_id"])
        defects = [ending for ending in endings if ending["outcome"] == "defect"]
        if len(captions) != len({clip for clip, _, _ in captions}) or len(captions) != len(
            {text for _, text, _ in captions}
        ):
            defects.append({"detail": f"captions differ for one clip, or agree for two: {captions}"})
        defects += [
            {"detail": f"{times} answers with one request id {id_}"} for id_, times in request_ids.items() if times > 1
        ]
        if Counter(sent) != Counter(ending["ended"] for ending in endings):
            without = set(sent) - {ending["ended"] for ending in endings}
            defects.append({"detail": f"requests and endings do not match: {sorted(without)[:20]} without ending"})
        return {
            "sent": len(sent),
            **dict.fromkeys(OUTCOMES, 0),
            **Counter(ending["outcome"] for ending in endings),
            "by_kind": dict(Counter(ending["kind"] for ending in endings)),
            "details": dict(
                Counter(f"{e['outcome']}: {e['detail']}"[:120] for e in endings if e["outcome"] != "answered")
            ),
            "defects": defects[:20],
        }

    def _lines(self) -> list[dict[str, Any]]:
        if not self.journal.exists():
            return []
        return [json.loads(line) for line in self.journal.read_text().splitlines(keepends=True) if line.endswith("\n")]
