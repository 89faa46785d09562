"""Generator of the recording and alert rules: `python deploy/prometheus/make.py` writes both files next to this one.

Code makes them because each objective needs the same rules over several windows, and because the live test runs the
same rules with shorter windows (`--pace 0.0166 --directory …`). `--runbooks` sets the base of the links to the pages of
`deploy/alerts`.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
JOB = 'job="captioner"'
MINUTE, HOUR, DAY = 60, 3600, 86400

ANSWERED = 'outcome=~"finished|partial"'
FAILED = 'outcome=~"failed|failed_midstream"'
JUDGED = 'outcome=~"finished|partial|failed|failed_midstream"'
"""Outcomes that count for availability: a caller's mistake or cancellation is no failure of the service."""

AVAILABILITY = 0.999
TIMELY = 0.95
"""Share of captions that must begin, and end, within the time limits for their length."""

TTFT_S = {"short": 2.5, "medium": 5, "long": 30}
E2E_S = {"short": 30, "medium": 60, "long": 300}
"""Time limits by class of audio length: to 30 s, to 300 s, longer. Each must be a bound of the histogram's buckets."""

WINDOWS = {"5m": 5 * MINUTE, "30m": 30 * MINUTE, "1h": HOUR, "2h": 2 * HOUR, "6h": 6 * HOUR, "1d": DAY, "3d": 3 * DAY}
PAGE = ((14.4, "1h", "5m"), (6, "6h", "30m"))
TICKET = ((3, "1d", "2h"), (1, "3d", "6h"))
"""Burn rate, long and short window: 2 % of a month's budget in an hour, 5 % in six; 10 % in a day or in three days."""

MIN_REQUESTS = 20
"""Requests in the first long window below which a ratio is no evidence."""

DEFECTIVE = 0.05
"""Share of captions that loop or are blank, above which something is wrong with the model or the audio: half of what is
reported of a sister model (one file in ten)."""

_HEADER = "# Made by deploy/prometheus/make.py; change it there.\n"


@dataclass(frozen=True, slots=True)
class Pace:
    """Scale of all durations: 1 in production, less in tests."""

    factor: float = 1.0

    def __call__(self, seconds: float) -> str:
        """Return a scaled duration in PromQL's notation."""
        return f"{max(1, math.ceil(seconds * self.factor))}s" if self.factor != 1 else _duration(int(seconds))

    def seconds(self, seconds: float) -> str:
        """Return a scaled number of seconds, to compare with."""
        return f"{seconds * self.factor:g}"


def records(pace: Pace) -> dict[str, Any]:
    """Return the recording rules, which dashboards and alerts read."""
    w5 = pace(5 * MINUTE)
    rules = [
        _record("captioner:audio_seconds:rate5m", f"sum(rate(captioner_audio_seconds_total[{w5}]))"),
        _record("captioner:audio_decoded_seconds:rate5m", f"sum(rate(captioner_audio_decoded_seconds_total[{w5}]))"),
        _record("captioner:requests:rate5m", f"sum by (outcome) (rate(captioner_requests_total[{w5}]))"),
        _record(
            "captioner:backlog_audio_seconds",
            "sum(captioner_audio_queue_audio_seconds) + sum(captioner_engine_waiting_audio_seconds)",
        ),
        _record(
            "captioner:audio_workers_busy:ratio5m",
            f"rate(captioner_audio_workers_busy_seconds_total[{w5}]) / captioner_audio_workers",
        ),
        _record(
            "captioner:cpu_seconds_per_audio_hour",
            f"3600 * sum by (part) (rate(captioner_cpu_seconds_total[{w5}])) "
            "/ on () group_left () (captioner:audio_seconds:rate5m > 0)",
        ),
        _record(
            "captioner:gpu_seconds_per_audio_hour",
            "3600 * sum(captioner_engine_gpus) / (captioner:audio_seconds:rate5m > 0)",
        ),
    ]
    for name, seconds in WINDOWS.items():
        window = pace(seconds)
        all_requests = f"sum(rate(captioner_requests_total{{{JUDGED}}}[{window}]))"
        failed = f"sum(rate(captioner_requests_total{{{FAILED}}}[{window}]))"
        rules.append(_record(f"captioner:errors:ratio_rate{name}", f"{failed} / ({all_requests} > 0)"))
        for sli, metric, limits, labels in (
            ("ttft_slow", "captioner_time_to_first_token_seconds", TTFT_S, ""),
            ("e2e_slow", "captioner_request_duration_seconds", E2E_S, f",{ANSWERED}"),
        ):
            for length, limit in limits.items():
                chosen = f'length="{length}"{labels}'
                timely = f'sum(rate({metric}_bucket{{{chosen},le=~"{_le(limit)}"}}[{window}]))'
                of_all = f"sum(rate({metric}_count{{{chosen}}}[{window}]))"
                rules.append(
                    _record(f"captioner:{sli}:ratio_rate{name}", f"1 - {timely} / ({of_all} > 0)", length=length)
                )
    return {"groups": [{"name": "captioner.records", "interval": pace(15), "rules": rules}]}


def alerts(pace: Pace, runbooks: str = "deploy/alerts") -> dict[str, Any]:
    """Return the alert rules.

    Label `severity`: a page wakes somebody, a ticket waits for the morning. Label `kind`: a cause that pages silences
    the symptoms that follow from it (deploy/alertmanager).
    """
    made = _Alerts(pace, runbooks)
    _objectives(made)
    _causes(made)
    _tickets(made)
    return {"groups": [{"name": "captioner.alerts", "interval": pace(15), "rules": made.rules}]}


class _Alerts:
    def __init__(self, pace: Pace, runbooks: str) -> None:
        self.pace = pace
        self.rules: list[dict[str, Any]] = []
        self._runbooks = runbooks

    def add(
        self,
        name: str,
        expr: str,
        summary: str,
        *,
        severity: str,
        kind: str = "cause",
        lasting: int = 0,
        lingering: int = 0,
    ) -> None:
        rule = {"alert": name, "expr": expr}
        if lasting:
            rule["for"] = self.pace(lasting)
        if lingering:  # as long as the short windows of the alerts that it silences
            rule["keep_firing_for"] = self.pace(lingering)
        self.rules.append(
            rule
            | {
                "labels": {"severity": severity, "kind": kind, "service": "captioner"},
                "annotations": {"summary": summary, "runbook_url": f"{self._runbooks}/{name}.md"},
            }
        )


def _objectives(made: _Alerts) -> None:
    """Add alerts on the burn rate of each objective's budget, over a long window and still over a short one."""
    failing, captions = (
        f"More than {100 * (1 - AVAILABILITY):g} % of requests fail",
        "Captions of {{ $labels.length }} audio",
    )
    # Slowness pages later than its causes do (a backlog, a stall), which then silence it.
    for name, sli, budget, fact, lasting in (
        ("CaptionerErrors", "errors", 1 - AVAILABILITY, failing, 2 * MINUTE),
        ("CaptionerFirstTokenSlow", "ttft_slow", 1 - TIMELY, f"{captions} begin too late", 5 * MINUTE),
        ("CaptionerCaptionSlow", "e2e_slow", 1 - TIMELY, f"{captions} end too late", 5 * MINUTE),
    ):
        for suffix, severity, windows in (("", "page", PAGE), ("Slowly", "ticket", TICKET)):
            burns = [
                f"(captioner:{sli}:ratio_rate{long} > {rate * budget:.6g} "
                f"and captioner:{sli}:ratio_rate{short} > {rate * budget:.6g})"
                for rate, long, short in windows
            ]
            first = made.pace(WINDOWS[windows[0][1]])
            enough = f"sum(increase(captioner_requests_total{{{JUDGED}}}[{first}])) >= {MIN_REQUESTS}"
            expr = f"({' or '.join(burns)}) and on () {enough}"
            pace_of_burn = "fast" if severity == "page" else "slowly"
            made.add(
                f"{name}{suffix}",
                expr,
                f"{fact}: the month's error budget burns {pace_of_burn}.",
                severity=severity,
                kind="symptom",
                lasting=lasting if severity == "page" else 15 * MINUTE,
            )


def _causes(made: _Alerts) -> None:
    """Add alerts on causes that page, because callers suffer or money is at stake."""
    pace = made.pace
    made.add(
        "CaptionerNothingScraped",
        f"absent(up{{{JOB},role!~'ray|haproxy'}} == 1)",
        "Prometheus scrapes no process of the service: the service is down or unmonitored.",
        severity="page",
        lasting=3 * MINUTE,
    )
    made.add(
        "CaptionerNotReady",
        'max(captioner_ready{role!="engine"}) == 0',
        "No process can make captions: every request is refused.",
        severity="page",
        lasting=10 * MINUTE,
    )
    made.add(
        "CaptionerEngineStalled",
        f"captioner_engine_stalled_seconds > {pace.seconds(MINUTE)}",
        "The engine at {{ $labels.instance }} is stalled: requests are running and no step has completed for 60 s.",
        severity="page",
        lasting=15,
        lingering=6 * MINUTE,
    )
    made.add(
        "CaptionerReplicaCrashLoop",
        f"max by (replica) (increase(captioner_replicas_lost_total[{pace(15 * MINUTE)}])) >= 3 "
        f"or changes(process_start_time_seconds{{{JOB}}}[{pace(15 * MINUTE)}]) >= 3",
        "Processes of the service end repeatedly: three times within 15 minutes.",
        severity="page",
    )
    made.add(
        "CaptionerBacklogGrowing",
        f"captioner:backlog_audio_seconds > {pace.seconds(MINUTE)} * captioner:audio_seconds:rate5m "
        f"and captioner:backlog_audio_seconds > 0.8 * captioner:backlog_audio_seconds offset {pace(5 * MINUTE)} "
        "and captioner:backlog_audio_seconds > 60",
        "The backlog exceeds one minute of captioning and does not shrink.",
        severity="page",
        lasting=3 * MINUTE,
        lingering=15 * MINUTE,
    )
    made.add(
        "CaptionerLedgerJournalFilling",
        "captioner_ledger_journal_bytes / (captioner_ledger_journal_limit_bytes > 0) > 0.5",
        "The ledger's journal at {{ $labels.instance }} is more than half full; requests are refused when it is full.",
        severity="page",
        lasting=5 * MINUTE,
    )
    made.add(
        "CaptionerLedgerNotWritable",
        "captioner_ledger_writable == 0 or captioner_ledger_unrecorded > 0",
        "{{ $labels.instance }} cannot record usage, its disk is full or failing: new requests are refused.",
        severity="page",
        lasting=30,
    )


def _tickets(made: _Alerts) -> None:
    """Add alerts that can wait until the morning."""
    pace = made.pace
    # Left out: HAProxy, which runs only on nodes with replicas, and the `captions` endpoint, which a PodMonitor scrapes
    # in each pod, whether or not Ray has placed a process there.
    made.add(
        "CaptionerTargetDown",
        f"up{{{JOB},role!='haproxy',endpoint!='captions'}} == 0 "
        f"and on () count(up{{{JOB},role!~'ray|haproxy'}} == 1) > 0",
        "{{ $labels.instance }} cannot be scraped while others can.",
        severity="ticket",
        lasting=5 * MINUTE,
    )
    made.add(
        "CaptionerAudioWorkersDying",
        f"increase(captioner_audio_worker_deaths_total[{pace(15 * MINUTE)}]) >= 3",
        "Audio workers of {{ $labels.instance }} die repeatedly, each with its clip: three within 15 minutes.",
        severity="ticket",
    )
    made.add(
        "CaptionerDownloadProcessDying",
        f"increase(captioner_download_process_deaths_total[{pace(15 * MINUTE)}]) >= 3",
        "The download process of {{ $labels.instance }} dies repeatedly with its downloads: three times in 15 minutes.",
        severity="ticket",
    )
    made.add(
        "CaptionerDecodePoolSaturated",
        "captioner:audio_workers_busy:ratio5m > 0.9 and captioner_audio_queue_depth > 0",
        "All audio workers of {{ $labels.instance }} are busy, and clips are queued.",
        severity="ticket",
        lasting=10 * MINUTE,
    )
    made.add(
        "CaptionerDatabaseDown",
        "captioner_database_up == 0",
        "{{ $labels.instance }} cannot use the database: keys are not updated, and ledger entries are not written.",
        severity="ticket",
        lasting=2 * MINUTE,
        lingering=3 * MINUTE,
    )
    made.add(
        "CaptionerLedgerLagging",
        f"captioner_ledger_lag_seconds > {pace.seconds(5 * MINUTE)}",
        "Ledger entries of {{ $labels.instance }} have waited for the database for more than 5 minutes.",
        severity="ticket",
        lasting=2 * MINUTE,
    )
    made.add(
        "CaptionerLimitsStoreDown",
        "captioner_limits_store_up == 0",
        "The store of limits does not answer {{ $labels.instance }}, which applies limits from its own counts alone.",
        severity="ticket",
        lasting=5 * MINUTE,
    )
    made.add(
        "CaptionerKeysOutdated",
        f"captioner_keys_age_seconds > {pace.seconds(5 * MINUTE)}",
        "{{ $labels.instance }} checks callers against keys more than 5 minutes old: revoked keys still work.",
        severity="ticket",
        lasting=2 * MINUTE,
    )
    made.add(
        "CaptionerSpendingUnusual",
        f"sum by (tenant) (rate(captioner_tenant_tokens_total[{pace(HOUR)}])) > 5 * "
        f"sum by (tenant) (rate(captioner_tenant_tokens_total[{pace(DAY)}] offset {pace(HOUR)})) > 20 "
        f"and sum by (tenant) (captioner_tenant_tokens_total offset {pace(DAY)}) > 0",
        "Tenant {{ $labels.tenant }} uses more than five times as many tokens as on the day before.",
        severity="ticket",
        lasting=10 * MINUTE,
    )
    hour = pace(HOUR)
    defective = (
        f'(sum(rate(captioner_caption_defects_total{{defect=~"loop|blank|short"}}[{hour}])) '
        f'+ sum(rate(captioner_caption_retries_total{{result="cured"}}[{hour}])))'
    )
    made.add(
        "CaptionerCaptionsDefective",
        f"{defective} / sum(rate(captioner_requests_total{{{ANSWERED}}}[{hour}])) > {DEFECTIVE} "
        f"and sum(increase(captioner_requests_total{{{ANSWERED}}}[{hour}])) > {MIN_REQUESTS}",
        "More than one caption in twenty loops or is blank.",
        severity="ticket",
        lasting=10 * MINUTE,
    )
    made.add(
        "CaptionerBudgetExhausted",
        "sum by (tenant) (increase(captioner_tenant_requests_rate_limited_total"
        f'{{limit="budget_exhausted"}}[{pace(HOUR)}])) > 0',
        "Requests of tenant {{ $labels.tenant }} are refused: its budget is exhausted.",
        severity="ticket",
    )
    made.add(
        "CaptionerDescriptorsNearLimit",
        f"max by (instance) (process_open_fds{{{JOB},role!~'ray|haproxy'}} "
        f"/ process_max_fds{{{JOB},role!~'ray|haproxy'}}) > 0.7 or sum by (instance) "
        f"(increase(captioner_connections_refused_total{{reason=~'descriptors|evicted'}}[{pace(5 * MINUTE)}])) > 0",
        "{{ $labels.instance }} has few descriptors left: connections are closed or refused to admit others.",
        severity="ticket",
        lasting=2 * MINUTE,
    )
    made.add(
        "CaptionerBoundNear",
        'captioner_saturation_ratio{resource=~"concurrent_requests|bodies|downloads|features|uploads"} > 0.9',
        "{{ $labels.resource }} of {{ $labels.instance }} is over 90 % full; requests beyond its bound are refused.",
        severity="ticket",
        lasting=10 * MINUTE,
    )


def _record(name: str, expr: str, **labels: str) -> dict[str, Any]:
    return {"record": name, "expr": expr} | ({"labels": labels} if labels else {})


def _le(limit: float) -> str:
    """Return a regular expression for both spellings of a bound, `5` and `5.0`: the exposition format decides."""
    return f"{limit:g}" if limit % 1 else f"{limit:g}|{limit:g}.0"


def _duration(seconds: int) -> str:
    for unit, size in (("d", DAY), ("h", HOUR), ("m", MINUTE)):
        if seconds % size == 0:
            return f"{seconds // size}{unit}"
    return f"{seconds}s"


def text(rules: dict[str, Any]) -> str:
    """Return the text of a rule file."""
    return _HEADER + yaml.safe_dump(rules, sort_keys=False, width=110, allow_unicode=True)


def main() -> None:
    """Write both rule files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pace", type=float, default=1.0)
    parser.add_argument("--runbooks", default="deploy/alerts")
    parser.add_argument("--directory", type=Path, default=HERE)
    chosen = parser.parse_args()
    pace = Pace(chosen.pace)
    (chosen.directory / "captioner.records.yml").write_text(text(records(pace)))
    (chosen.directory / "captioner.alerts.yml").write_text(text(alerts(pace, chosen.runbooks)))


if __name__ == "__main__":
    main()
