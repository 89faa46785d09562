"""Live chain: a real Prometheus with our rules, a real Alertmanager, and a receiver that records notifications.

The committed files are used, with other addresses and shorter times: a minute lasts a second.
"""

from __future__ import annotations

import json
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, Self

import httpx
import yaml

from tests.cluster.running import free_port
from tests.observability.test_rules import DEPLOY, make
from tests.support.programs import program

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

PACE = make.Pace(1 / 60)


class Chain:
    """Prometheus and Alertmanager over the service at `url`, scraped at the interval `every`. A context.

    `token` is the service's `metrics_token`, if it has one.
    """

    def __init__(self, url: str, directory: Path, every: str = "1s", token: str | None = None) -> None:
        self._directory = directory
        self._token = token
        self._every = every
        self._processes: list[subprocess.Popen[bytes]] = []
        self._receiver = ThreadingHTTPServer(("127.0.0.1", 0), _receiver(self))
        self.url = f"http://127.0.0.1:{(port := free_port())}"
        self._alertmanager = f"127.0.0.1:{(alert_port := free_port())}"
        self.notifications: list[tuple[str, str, str]] = []
        """Receiver, alert, and `firing` or `resolved`, in the order of arrival."""
        (directory / "captioner.records.yml").write_text(make.text(make.records(PACE)))
        (directory / "captioner.alerts.yml").write_text(make.text(make.alerts(PACE)))
        self._write("prometheus.yml", self._prometheus(url))
        self._write("alertmanager.yml", self._alerting())
        del port, alert_port

    def __enter__(self) -> Self:
        threading.Thread(target=self._receiver.serve_forever, daemon=True).start()
        here, listen = self._directory, self.url.removeprefix("http://")
        self._start(
            "prometheus-alertmanager",
            f"--config.file={here}/alertmanager.yml",
            f"--storage.path={here}/alerts",
            f"--web.listen-address={self._alertmanager}",
            "--cluster.listen-address=",
        )
        self._start(
            "prometheus",
            f"--config.file={here}/prometheus.yml",
            f"--storage.tsdb.path={here}/series",
            f"--web.listen-address={listen}",
        )
        self.until(self._ready)
        return self

    def __exit__(self, *exc_info: object) -> None:
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.wait(timeout=60)
        self._receiver.shutdown()
        self._receiver.server_close()

    def query(self, expr: str) -> list[Any]:
        """Return the series of an instant query."""
        answer = httpx.post(f"{self.url}/api/v1/query", data={"query": expr}, timeout=30).json()
        assert answer["status"] == "success", (expr, answer)
        return list(answer["data"]["result"])

    def value(self, expr: str) -> float:
        """Return the value of an expression with one series; 0 if there is none."""
        found = self.query(expr)
        assert len(found) <= 1, (expr, found)
        return float(found[0]["value"][1]) if found else 0.0

    def names(self) -> set[str]:
        """Return the names of all metrics in Prometheus."""
        return set(httpx.get(f"{self.url}/api/v1/label/__name__/values", timeout=30).json()["data"])

    def firing(self) -> set[str]:
        """Return the alerts that fire in Prometheus, silenced or not."""
        return {series["metric"]["alertname"] for series in self.query('ALERTS{alertstate="firing"}')}

    def until(self, condition: Callable[[], object], timeout_s: float = 90) -> None:
        """Wait for a condition. Raises `TimeoutError` with the notifications and the firing alerts."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(self.notifications, self.firing())
            time.sleep(0.2)

    def _ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/-/ready", timeout=5).status_code == 200 and bool(
                self.query("captioner_ready")
            )
        except httpx.TransportError:
            return False

    def _start(self, name: str, *flags: str) -> None:
        with (self._directory / f"{name}.log").open("wb") as log:
            self._processes.append(subprocess.Popen([program(name), *flags], stdout=log, stderr=log))

    def _write(self, name: str, content: Any) -> None:
        (self._directory / name).write_text(yaml.safe_dump(content))

    def _prometheus(self, url: str) -> Any:
        config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
        config["global"] = {
            "scrape_interval": self._every,
            "scrape_timeout": self._every,
            "evaluation_interval": self._every,
        }
        config["alerting"]["alertmanagers"][0]["static_configs"][0]["targets"] = [self._alertmanager]
        job = next(job for job in config["scrape_configs"] if job["job_name"] == "captioner")
        job["http_sd_configs"][0] |= {"url": f"{url}/metrics/targets", "refresh_interval": "1s"}
        for scraped in (job, job["http_sd_configs"][0]):
            del scraped["authorization"]["credentials_file"]
            if self._token is None:
                del scraped["authorization"]
            else:
                scraped["authorization"]["credentials"] = self._token
        return config | {"scrape_configs": [job]}

    def _alerting(self) -> Any:
        config = yaml.safe_load((DEPLOY / "alertmanager" / "alertmanager.yml").read_text())
        for route in (config["route"], *config["route"]["routes"]):
            wait = "5s" if "group_wait" in route and route is not config["route"] else "2s"
            route |= {"group_wait": wait, "group_interval": "1s", "repeat_interval": "1h"}
        for receiver in config["receivers"]:
            hook = receiver["webhook_configs"][0]
            hook["url"] = f"http://127.0.0.1:{self._receiver.server_port}/{receiver['name']}"
        return config


def _receiver(chain: Chain) -> type[BaseHTTPRequestHandler]:
    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            notification = json.loads(self.rfile.read(int(self.headers["content-length"])))
            for alert in notification["alerts"]:
                entry = self.path.removeprefix("/"), alert["labels"]["alertname"], alert["status"]
                if entry not in chain.notifications:
                    chain.notifications.append(entry)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            """Log nothing."""

    return Receiver
