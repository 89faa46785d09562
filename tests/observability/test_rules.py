"""Rules: the committed files equal the code's, Prometheus accepts them, and each alert fires when it should only.

Each case is a promtool unit test: series, a time, and the labels with which the alert fires (or none).
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from serving.observability import metrics
from tests.support.programs import program

if TYPE_CHECKING:
    from types import ModuleType

DEPLOY = Path(__file__).parents[2] / "deploy"
HERE = DEPLOY / "prometheus"


def load(path: Path) -> ModuleType:
    """Load a program of `deploy` as a module."""
    spec = importlib.util.spec_from_file_location(f"deploy_{path.parent.name}_{path.stem}", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


make, boards = load(HERE / "make.py"), load(DEPLOY / "grafana" / "boards.py")
ALERTS = {rule["alert"]: rule for rule in make.alerts(make.Pace())["groups"][0]["rules"]}


@dataclass(frozen=True)
class Case:
    """A promtool test: `series` in steps of a fixed time, and the labels with which the alert fires `at` a time."""

    alert: str
    at: str
    series: dict[str, str]
    fires: list[dict[str, str]] = field(default_factory=list)
    also_fire: tuple[str, ...] = ()
    """Other alerts that fire as well; in the live chain they are silenced or say the same."""

    @property
    def step(self) -> str:
        """Time between two values, longer in cases that last longer."""
        hours = int(self.at.removesuffix("h")) if self.at.endswith("h") else 0
        return "5m" if hours > 12 else "1m" if hours else "15s"


EVALUATED = {"15s": "30s", "1m": "2m", "5m": "10m"}
"""Evaluation interval by step: at production's interval, days would take minutes to evaluate."""


def requests(finished: str, failed: str, *, failing: str = "failed", answered: str = "finished") -> dict[str, str]:
    """Return series of requests of two frontends, so that sums matter."""
    return {
        'captioner_requests_total{instance="a",dialect="openai",outcome="finished",code="stop"}': finished,
        f'captioner_requests_total{{instance="b",dialect="dashscope",outcome="{answered}",code="c"}}': finished,
        f'captioner_requests_total{{instance="b",dialect="openai",outcome="{failing}",code="engine_failed"}}': failed,
        # Callers' own mistakes and cancellations do not count, however many.
        'captioner_requests_total{instance="a",dialect="openai",outcome="rejected",code="audio_empty"}': finished,
        'captioner_requests_total{instance="a",dialect="openai",outcome="disconnected",code="disconnected"}': finished,
    }


def slow(metric: str, le: str, quick: str, every: str, *labels: str) -> dict[str, str]:
    """Return series of captions of which `quick` are in time."""
    chosen = ",".join(labels)
    return requests("0+20x1000", "0x1000") | {
        f'{metric}_bucket{{{chosen},le="{le}"}}': quick,
        f'{metric}_bucket{{{chosen},le="+Inf"}}': every,
        f"{metric}_count{{{chosen}}}": every,
    }


TTFT, E2E, DONE = "captioner_time_to_first_token_seconds", "captioner_request_duration_seconds", 'outcome="finished"'
BACKLOG = 'captioner_engine_waiting_audio_seconds{instance="a"}'
AUDIO_QUEUE = 'captioner_audio_queue_audio_seconds{instance="a"}'
CAPTIONED = 'captioner_audio_seconds_total{instance="a",dialect="openai"}'
UP, READY = 'up{job="captioner",instance="a",role="server"}', 'captioner_ready{job="captioner",instance="a"}'
A = [{"instance": "a"}]
SERVER = '{job="captioner",instance="a",role="server"}'

CASES = [
    # 5 % of requests fail: the month's budget is gone in 15 hours.
    Case("CaptionerErrors", "1h", requests("0+10x1000", "0+1x1000"), [{}], ("CaptionerErrorsSlowly",)),
    # In mid-stream.
    Case("CaptionerErrors", "1h", requests("0+10x1000", "0+1x1000", failing="failed_midstream"), [{}],
         ("CaptionerErrorsSlowly",)),
    # 0.5 %: a ticket, no page.
    Case("CaptionerErrors", "3h", requests("0+100x1000", "0+1x1000"), also_fire=("CaptionerErrorsSlowly",)),
    Case("CaptionerErrorsSlowly", "3h", requests("0+100x1000", "0+1x1000"), [{}]),
    # 0.02 %: within the objective.
    Case("CaptionerErrorsSlowly", "3h", requests("0+250x1000", "0+0.1x1000")),
    # 0.07 %, where half of the answers were cut by the deadline: of the others alone it would be 0.14 %.
    Case("CaptionerErrorsSlowly", "3h", requests("0+250x1000", "0+0.35x1000", answered="partial")),
    # All failed, but they were three.
    Case("CaptionerErrors", "1h", requests("0x1000", "0 0 0 3x1000")),
    # The failures are over: they are in the long window, but no longer in the short one.
    Case("CaptionerErrors", "2h", requests("0+10x1000", "0+1x80 80x900"), also_fire=("CaptionerErrorsSlowly",)),
    Case("CaptionerFirstTokenSlow", "1h", slow(TTFT, "2.5", "0+1x1000", "0+10x1000", 'length="short"'),
         [{"length": "short"}], ("CaptionerFirstTokenSlowSlowly",)),
    Case("CaptionerFirstTokenSlow", "1h", slow(TTFT, "2.5", "0+97x1000", "0+100x1000", 'length="short"')),
    Case("CaptionerFirstTokenSlowSlowly", "3h", slow(TTFT, "30.0", "0+80x1000", "0+100x1000", 'length="long"'),
         [{"length": "long"}]),
    Case("CaptionerFirstTokenSlowSlowly", "3h", slow(TTFT, "30.0", "0+96x1000", "0+100x1000", 'length="long"')),
    Case("CaptionerCaptionSlow", "1h", slow(E2E, "60", "0+1x1000", "0+10x1000", 'length="medium"', DONE),
         [{"length": "medium"}], ("CaptionerCaptionSlowSlowly",)),
    Case("CaptionerCaptionSlow", "1h", slow(E2E, "60", "0+98x1000", "0+100x1000", 'length="medium"', DONE)),
    Case("CaptionerCaptionSlow", "1h",
         slow(E2E, "60", "0+1x1000", "0+10x1000", 'length="medium"', 'outcome="partial"'),
         [{"length": "medium"}], ("CaptionerCaptionSlowSlowly",)),
    Case("CaptionerCaptionSlowSlowly", "3h", slow(E2E, "30.0", "0+80x1000", "0+100x1000", 'length="short"', DONE),
         [{"length": "short"}]),
    Case("CaptionerCaptionSlowSlowly", "3h", slow(E2E, "30.0", "0+99x1000", "0+100x1000", 'length="short"', DONE)),
    Case("CaptionerNothingScraped", "10m", {UP: "1x10 0x100"}, [{}]),
    Case("CaptionerNothingScraped", "10m", {'up{job="captioner",instance="b"}': "0x100"},
         also_fire=("CaptionerTargetDown",)),
    Case("CaptionerNothingScraped", "10m", {UP: "0x100", 'up{job="captioner",instance="r",role="ray"}': "1x100"},
         [{}]),
    Case("CaptionerNotReady", "15m", {READY: "0x100"}, [{}]),
    # The model is loading, which takes minutes.
    Case("CaptionerNotReady", "8m", {READY: "0x100"}),
    Case("CaptionerNotReady", "15m",
         {READY: "0x100", 'captioner_ready{job="captioner",instance="b"}': "1x100"}),
    Case("CaptionerEngineStalled", "3m", {'captioner_engine_stalled_seconds{instance="a"}': "0 0 0 30 66x90"},
         A),
    Case("CaptionerEngineStalled", "20m", {'captioner_engine_stalled_seconds{instance="a"}': "0 36 12x90"}),
    Case("CaptionerReplicaCrashLoop", "10m",
         {'captioner_replicas_lost_total{instance="a",replica="engine"}': "0 1 1 2 2 2 3 3 4x90",
          'captioner_replicas_lost_total{instance="a",replica="frontend"}': "0x100"}, [{"replica": "engine"}]),
    Case("CaptionerReplicaCrashLoop", "10m",
         {'captioner_replicas_lost_total{instance="a",replica="engine"}': "0 0 1x90"}),
    Case("CaptionerReplicaCrashLoop", "10m",
         {'process_start_time_seconds{job="captioner",instance="a"}': "1 1 5 5 9 9 14x90"},
         [{"job": "captioner", "instance": "a"}]),
    Case("CaptionerReplicaCrashLoop", "10m",
         {'process_start_time_seconds{job="captioner",instance="a"}': "1 1 5x90"}),
    # 10 audio-seconds are captioned per second, 1,500 are queued, and the queue grows.
    Case("CaptionerBacklogGrowing", "20m",
         {BACKLOG: "0+100x100", AUDIO_QUEUE: "0x100", CAPTIONED: "0+150x100"}, [{}]),
    # As much is queued, but the queue shrinks.
    Case("CaptionerBacklogGrowing", "20m",
         {BACKLOG: "9000-100x90", AUDIO_QUEUE: "0x100", CAPTIONED: "0+150x100"}),
    # The queue is only half a minute of captioning.
    Case("CaptionerBacklogGrowing", "20m",
         {BACKLOG: "300x100", AUDIO_QUEUE: "0x100", CAPTIONED: "0+150x100"}),
    Case("CaptionerLedgerJournalFilling", "10m",
         {'captioner_ledger_journal_bytes{instance="a"}': "600x100",
          'captioner_ledger_journal_limit_bytes{instance="a"}': "1000x100"}, A),
    Case("CaptionerLedgerJournalFilling", "10m",
         {'captioner_ledger_journal_bytes{instance="a"}': "100x100",
          'captioner_ledger_journal_limit_bytes{instance="a"}': "1000x100"}),
    Case("CaptionerLedgerNotWritable", "5m", {'captioner_ledger_writable{instance="a"}': "1x4 0x100"}, A),
    Case("CaptionerLedgerNotWritable", "5m", {'captioner_ledger_unrecorded{instance="a"}': "0x4 3x100"}, A),
    Case("CaptionerLedgerNotWritable", "5m",
         {'captioner_ledger_writable{instance="a"}': "1x4 0 1x100",
          'captioner_ledger_unrecorded{instance="a"}': "0x100"}),
    Case("CaptionerTargetDown", "10m", {'up{job="captioner",instance="b"}': "0x100"},
         [{"job": "captioner", "instance": "b"}]),
    Case("CaptionerTargetDown", "10m", {'up{job="captioner",instance="b"}': "0x10 1x90"}),
    Case("CaptionerTargetDown", "10m", {UP: "0x100"}, also_fire=("CaptionerNothingScraped",)),
    # A PodMonitor's targets: Ray's agent is in every pod, frontends, engines and HAProxy only where Ray places them.
    Case("CaptionerTargetDown", "10m",
         {'up{job="captioner",instance="p",role="ray",endpoint="metrics"}': "0x100"},
         [{"job": "captioner", "instance": "p", "role": "ray", "endpoint": "metrics"}]),
    Case("CaptionerTargetDown", "10m",
         {'up{job="captioner",instance="p",role="engine",endpoint="captions"}': "0x100",
          'up{job="captioner",instance="q",role="haproxy",endpoint="haproxy"}': "0x100"}),
    Case("CaptionerAudioWorkersDying", "10m",
         {'captioner_audio_worker_deaths_total{instance="a"}': "0 1 1 2 3 4x90"}, A),
    Case("CaptionerAudioWorkersDying", "10m", {'captioner_audio_worker_deaths_total{instance="a"}': "0 1x90"}),
    Case("CaptionerDownloadProcessDying", "10m",
         {'captioner_download_process_deaths_total{instance="a"}': "0 1 1 2 3 4x90"}, A),
    Case("CaptionerDownloadProcessDying", "10m",
         {'captioner_download_process_deaths_total{instance="a"}': "0 1x90"}),
    Case("CaptionerDecodePoolSaturated", "20m",
         {'captioner_audio_workers_busy_seconds_total{instance="a"}': "0+29x100",
          'captioner_audio_workers{instance="a"}': "2x100", 'captioner_audio_queue_depth{instance="a"}': "3x100"}, A),
    Case("CaptionerDecodePoolSaturated", "20m",
         {'captioner_audio_workers_busy_seconds_total{instance="a"}': "0+20x100",
          'captioner_audio_workers{instance="a"}': "2x100", 'captioner_audio_queue_depth{instance="a"}': "3x100"}),
    Case("CaptionerDatabaseDown", "10m", {'captioner_database_up{instance="a"}': "1 0x100"}, A),
    # One failed access is no outage.
    Case("CaptionerDatabaseDown", "10m", {'captioner_database_up{instance="a"}': "1 0 0 1x100"}),
    Case("CaptionerLedgerLagging", "10m", {'captioner_ledger_lag_seconds{instance="a"}': "400x100"}, A),
    Case("CaptionerLedgerLagging", "10m", {'captioner_ledger_lag_seconds{instance="a"}': "2x100"}),
    Case("CaptionerLimitsStoreDown", "10m", {'captioner_limits_store_up{instance="a"}': "0x100"}, A),
    Case("CaptionerLimitsStoreDown", "10m", {'captioner_limits_store_up{instance="a"}': "0 0 1x100"}),
    Case("CaptionerKeysOutdated", "10m", {'captioner_keys_age_seconds{instance="a"}': "400x100"}, A),
    Case("CaptionerKeysOutdated", "10m", {'captioner_keys_age_seconds{instance="a"}': "2x100"}),
    Case("CaptionerSpendingUnusual", "27h",
         {'captioner_tenant_tokens_total{tenant="t",kind="audio"}': "0+2000x300 600000+600000x50",
          'captioner_tenant_tokens_total{tenant="u",kind="audio"}': "0+600000x400"}, [{"tenant": "t"}]),
    # A tenfold of very few tokens is few tokens; and a new tenant has no day before.
    Case("CaptionerSpendingUnusual", "27h",
         {'captioner_tenant_tokens_total{tenant="t",kind="audio"}': "0+20x300 6000+2000x50",
          'captioner_tenant_tokens_total{tenant="new",kind="audio"}': "0x305 0+600000x50"}),
    # Of 4 captions a minute 0.3 loop or are blank, half of which a second sample cures; then a tenth of that.
    Case("CaptionerCaptionsDefective", "3h",
         {'captioner_requests_total{outcome="finished",dialect="openai",code="stop"}': "0+4x200",
          'captioner_caption_defects_total{defect="loop"}': "0+0.1x200",
          'captioner_caption_defects_total{defect="blank"}': "0+0.05x200",
          'captioner_caption_defects_total{defect="cut"}': "0+4x200",
          'captioner_caption_retries_total{defect="loop",result="cured"}': "0+0.15x200"}, [{}]),
    Case("CaptionerCaptionsDefective", "3h",
         {'captioner_requests_total{outcome="finished",dialect="openai",code="stop"}': "0+4x200",
          'captioner_caption_defects_total{defect="loop"}': "0+0.01x200",
          'captioner_caption_defects_total{defect="cut"}': "0+4x200",
          'captioner_caption_retries_total{defect="loop",result="cured"}': "0+0.02x200",
          'captioner_caption_retries_total{defect="loop",result="kept"}': "0+4x200"}),
    Case("CaptionerBudgetExhausted", "10m",
         {'captioner_tenant_requests_rate_limited_total{tenant="t",limit="budget_exhausted"}': "0 0 0 1 2x90"},
         [{"tenant": "t"}]),
    Case("CaptionerBudgetExhausted", "10m",
         {'captioner_tenant_requests_rate_limited_total{tenant="t",limit="requests_limited"}': "0+1x90"}),
    Case("CaptionerBoundNear", "20m", {'captioner_saturation_ratio{instance="a",resource="uploads"}': "0.95x100"},
         [{"instance": "a", "resource": "uploads"}]),
    # A busy engine has a full context.
    Case("CaptionerBoundNear", "20m",
         {'captioner_saturation_ratio{instance="a",resource="kv_cache"}': "0.99x100",
          'captioner_saturation_ratio{instance="a",resource="uploads"}': "0.8x100"}),
    Case("CaptionerDescriptorsNearLimit", "10m", {f"process_open_fds{SERVER}": "750x100",
                                                  f"process_max_fds{SERVER}": "1000x100"}, A),
    Case("CaptionerDescriptorsNearLimit", "10m", {f"process_open_fds{SERVER}": "650x100",
                                                  f"process_max_fds{SERVER}": "1000x100"}),
    Case("CaptionerDescriptorsNearLimit", "10m",
         {'captioner_connections_refused_total{instance="a",reason="evicted"}': "0+1x100"}, A),
    # Strangers that send no request at all.
    Case("CaptionerDescriptorsNearLimit", "10m",
         {'captioner_connections_refused_total{instance="a",reason="malformed"}': "0+9x100"}),
]  # fmt: skip


def test_the_committed_rules_equal_the_generated_ones() -> None:
    """Both rule files equal the output of `make.py`."""
    assert (HERE / "captioner.records.yml").read_text() == make.text(make.records(make.Pace()))
    assert (HERE / "captioner.alerts.yml").read_text() == make.text(make.alerts(make.Pace()))


def test_files_are_sound(tmp_path: Path) -> None:
    """Prometheus and Alertmanager accept their configuration, rules included, at any pace."""
    for path in HERE.glob("*.yml"):
        (tmp_path / path.name).write_text(path.read_text().replace("/run/secrets/", f"{tmp_path}/"))
    (tmp_path / "captioner_metrics_token").write_text("token")
    for command in (
        [program("promtool"), "check", "config", str(tmp_path / "prometheus.yml")],
        [program("amtool"), "check-config", str(DEPLOY / "alertmanager" / "alertmanager.yml")],
    ):
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_each_alert_is_tested_to_fire_and_to_stay_quiet() -> None:
    """Every alert has a case in which it fires, one in which it stays quiet, and a runbook page."""
    assert {case.alert for case in CASES if case.fires} == ALERTS.keys()
    assert {case.alert for case in CASES if not case.fires} == ALERTS.keys()
    for name, rule in ALERTS.items():
        page = DEPLOY.parent / rule["annotations"]["runbook_url"]
        text = page.read_text()
        assert text.startswith(f"# {name}\n"), page
        assert all(f"## {part}\n" in text for part in ("Symptoms", "Checks", "Actions")), page
    assert {page.stem for page in (DEPLOY / "alerts").glob("*.md")} == ALERTS.keys()


def test_runbook_pages_name_existing_panels() -> None:
    """Every dashboard that a page names exists, and so does every quoted panel."""
    titles = {board.title for board in boards.BOARDS}
    panels = {panel.title for board in boards.BOARDS for row in board.rows.values() for panel in row}
    for page in (DEPLOY / "alerts").glob("*.md"):
        text = re.sub(r"\s+", " ", re.sub(r"`[^`]*`", "", page.read_text()))
        assert set(re.findall(r"\*(Captioner: [^*]+)\*", text)) <= titles, page
        assert set(re.findall(r'"([A-Z][^"]*)"', text)) <= panels, page


def test_alerts_fire_and_stay_quiet(tmp_path: Path) -> None:
    """In each case the alert fires or stays quiet as expected, and no unnamed alert fires."""
    run(CASES, tmp_path)


def run(cases: list[Case], directory: Path) -> None:
    """Run cases with promtool and the committed rules. Raises `AssertionError` if an alert fires that should not."""
    rules = []
    for name in ("captioner.records.yml", "captioner.alerts.yml"):
        groups = yaml.safe_load((HERE / name).read_text())["groups"]
        (directory / name).write_text(
            yaml.safe_dump({"groups": [{"name": group["name"], "rules": group["rules"]} for group in groups]})
        )
        rules.append(str(directory / name))
    for step in {case.step for case in cases}:
        tests = [
            {
                "interval": step,
                "name": f"{number}: {case.alert} at {case.at}",
                "input_series": [{"series": name, "values": values} for name, values in _alive(case.series).items()],
                "alert_rule_test": [
                    {"alertname": name, "eval_time": case.at, "exp_alerts": _expected(case, name)}
                    for name in ALERTS
                    if name not in case.also_fire
                ],
            }
            for number, case in enumerate(cases)
            if case.step == step
        ]
        file = directory / f"{step}.test.yml"
        file.write_text(yaml.safe_dump({"rule_files": rules, "evaluation_interval": EVALUATED[step], "tests": tests}))
    command = [program("promtool"), "test", "rules", *map(str, directory.glob("*.test.yml"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def _alive(series: dict[str, str]) -> dict[str, str]:
    """Return the case's series, with those of a service that is scraped and ready."""
    return {UP: "1x1000", READY: "1x1000"} | series


def _expected(case: Case, name: str) -> list[dict[str, Any]]:
    if name != case.alert:
        return []
    rule = ALERTS[name]
    expected = []
    for labels in case.fires:
        summary = rule["annotations"]["summary"]
        for label, value in labels.items():
            summary = summary.replace(f"{{{{ $labels.{label} }}}}", value)
        annotations = rule["annotations"] | {"summary": summary}
        expected.append({"exp_labels": rule["labels"] | labels, "exp_annotations": annotations})
    return expected


def test_objectives_are_bounds_of_buckets() -> None:
    """Every time limit of an objective is a bucket bound: only there can the histogram be read."""
    assert set(make.TTFT_S.values()) <= set(metrics._TTFT_BUCKETS)
    assert set(make.E2E_S.values()) <= set(metrics._E2E_BUCKETS)


@pytest.mark.parametrize("factor", [1 / 60, 1 / 300])
def test_a_quicker_pace_is_sound_too(factor: float, tmp_path: Path) -> None:
    """Prometheus also accepts the rules with shorter windows, which the live test runs."""
    pace = make.Pace(factor)
    for name, rules in (("records", make.records(pace)), ("alerts", make.alerts(pace))):
        (tmp_path / f"{name}.yml").write_text(make.text(rules))
    command = [program("promtool"), "check", "rules", *map(str, tmp_path.glob("*.yml"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
