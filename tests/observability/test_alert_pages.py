"""Pages of alerts: sections, copyable commands that name existing metrics, messages and verbs, and links back."""

from __future__ import annotations

import json
import re
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml

from serving.tenancy.admin import verbs
from tests.support.programs import program

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "deploy" / "alerts").glob("*.md"))
SECTIONS = ["Symptoms", "Checks", "Commands", "Actions", "What not to do"]
RUNBOOK = (ROOT / "deploy" / "runbook.md").read_text()


def commands(page: Path) -> str:
    """Return the page's shell commands: those that read, and those of its actions."""
    return "".join(re.findall(r"^```sh\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL))


def queries() -> list[str]:
    """Return every query that a page sends to Prometheus."""
    return [query for page in PAGES for query in re.findall(r"^prom '(.*)'$", commands(page), re.MULTILINE)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_is_complete(page: Path) -> None:
    """It has its sections in order, commands with an output, things not to do, and links back."""
    text = page.read_text()
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == SECTIONS
    assert re.search(r"^```sh\n.+?^```\n\nOutput, as an example:\n\n```text\n.+?^```", text, re.MULTILINE | re.DOTALL)
    assert "\n- Do not " in text.partition("## What not to do\n")[2]
    last = text.rstrip().rpartition("\n\n")[2]
    assert last.startswith("Runbook: [")
    assert "](../runbook.md#" in last
    assert last.endswith("[observability](../observability.md#alerts).")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_are_shell_for_every_platform(page: Path) -> None:
    """The block parses, and has no command of one platform: these are in the runbook."""
    block = commands(page)
    subprocess.run(["bash", "-n"], input=block, text=True, check=True)
    assert not re.search(r"\bkubectl\b|\$K\b|\bdocker\b|\bsystemctl\b", block)
    assert "<" not in block.replace("<(", "")  # a placeholder in angle brackets would read a file


def test_only_actions_change_something() -> None:
    """The first block can be pasted at any time; verbs that change something are below the actions."""
    changing = re.compile(r"^captioner (tenants|keys|plans|prices|batches) (?!list|show)", re.MULTILINE)
    for page in PAGES:
        checks = page.read_text().partition("## Actions\n")[0]
        assert not changing.search(checks), page
    assert any(changing.search(commands(page)) for page in PAGES)


def test_functions_are_those_of_the_runbook() -> None:
    """Each function of the blocks is defined in the runbook's first part."""
    defined = set(re.findall(r"^([a-z]+)\(\)", RUNBOOK.partition("\n## ")[0], re.MULTILINE))
    used = {
        word
        for page in PAGES
        for word in re.findall(r"^(prom|events|captioner|logs|sample)\b", commands(page), re.MULTILINE)
    }
    assert {"prom", "events", "captioner"} <= used <= defined


def test_queries_are_accepted_by_prometheus(tmp_path: Path) -> None:
    """Prometheus parses each query."""
    assert len(queries()) > 60
    rules = [{"record": f"query:{number}", "expr": query} for number, query in enumerate(queries())]
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": [{"name": "pages", "rules": rules}]}))
    done = subprocess.run(
        [program("promtool"), "check", "rules", str(tmp_path / "rules.yml")],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_metrics_messages_and_records_exist() -> None:
    """Queries name exported metrics and recorded rules; `events` names a constant message of the service."""
    source = "".join(path.read_text() for path in (ROOT / "serving").rglob("*.py"))
    table = (ROOT / "deploy" / "observability.md").read_text()
    records = (ROOT / "deploy" / "prometheus" / "captioner.records.yml").read_text()
    for query in queries():
        for name in re.findall(r"captioner_[a-z_]+", query):
            series = re.sub(r"_(bucket|sum|count)$", "", name)
            assert f"| `{series}` |" in table, query
        for name in re.findall(r"captioner:[a-z_0-9:]+", query):
            assert f"record: {name}\n" in records, query
    for page in PAGES:
        for message in re.findall(r"^events '?([^'|\n]+?)'? *(?:\||$)", commands(page), re.MULTILINE):
            assert f'"{message}"' in source, (page.stem, message)


def test_verbs_and_limits_exist() -> None:
    """Commands are verbs of the table that the command line is made from, `doctor`, `settings` or `version`."""
    known = {verb.words for verb in verbs.VERBS}
    used = {
        word.strip()
        for page in PAGES
        for word in re.findall(r"^captioner ((?:(?:tenants|keys|plans) )?[a-z-]+)", commands(page), re.MULTILINE)
    }
    assert used - {"doctor", "settings", "version"} <= known
    assert "tenants set" in used


class _Prometheus(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        query = parse_qs(urlsplit(self.path).query)["query"]
        series = [
            {"metric": {"__name__": "up", "instance": "a:1", "job": "captioner", "role": "engine"}, "value": [1, "0"]}
        ]
        if query == ["sum(up)"]:
            series = [{"metric": {}, "value": [1, "3.5"]}]
        body = json.dumps({"status": "success", "data": {"resultType": "vector", "result": series}}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@pytest.fixture
def prometheus() -> Iterator[str]:
    """An address that answers queries as Prometheus does."""
    with HTTPServer(("127.0.0.1", 0), _Prometheus) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def shared(script: str) -> str:
    """Run a script after the runbook's block for every platform; return its output."""
    block = RUNBOOK.partition("### On every platform\n")[2].partition("```sh\n")[2].partition("```")[0]
    done = subprocess.run(
        ["bash", "-euc", f"{block}\n{script}"], capture_output=True, text=True, check=True, timeout=30
    )
    return done.stdout


def test_prom_prints_a_line_for_each_series(prometheus: str) -> None:
    """Labels without name and job, then the value; a sum is a value alone."""
    assert shared(f"PROMETHEUS={prometheus}; prom up; prom 'sum(up)'") == "instance=a:1 role=engine 0\n3.5\n"


def test_events_prints_the_lines_of_one_message() -> None:
    """Other messages and lines that are no JSON are left out."""
    lines = '{"message":"audio worker died","exit_status":-27}\nTraceback\n{"message":"audio worker died twice"}'
    script = f"logs() {{ printf '%s\\n' '{lines}'; }}; events 'audio worker died' | jq -c .exit_status"
    assert shared(script) == "-27\n"
