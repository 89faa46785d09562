"""Dashboards: panels and their expressions. `make.py` turns them into Grafana's JSON."""

from __future__ import annotations

from dataclasses import dataclass, field

RATE = "$__rate_interval"


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel: expressions by legend. `kind` is graph, stat (one number), or stack (a graph whose series add up)."""

    title: str
    unit: str
    exprs: dict[str, str]
    kind: str = "graph"
    about: str = ""


@dataclass(frozen=True, slots=True)
class Board:
    """One dashboard: rows of panels. `uid` is also the name of its file."""

    uid: str
    title: str
    about: str
    rows: dict[str, list[Panel]] = field(default_factory=dict)


def quantiles(metric: str, by: str = "", *, of: str = "", at: tuple[float, ...] = (0.5, 0.95)) -> dict[str, str]:
    """Return quantiles of a histogram, one series for each value of `by`."""
    labels, legend = (f"le, {by}", f"{{{{{by}}}}} ") if by else ("le", "")
    return {
        f"{legend}p{100 * q:g}": f"histogram_quantile({q}, sum by ({labels}) (rate({metric}_bucket{{{of}}}[{RATE}])))"
        for q in at
    }


def rate(metric: str, by: str, of: str = "") -> dict[str, str]:
    """Return a counter's rate, one series for each value of `by`."""
    return {f"{{{{{by}}}}}": f"sum by ({by}) (rate({metric}{{{of}}}[{RATE}]))"}


TTFT, E2E = "captioner_time_to_first_token_seconds", "captioner_request_duration_seconds"
STAGE, AUDIO = "captioner_stage_seconds", "captioner_audio_seconds_total"

OVERVIEW = Board(
    "captioner-overview",
    "Captioner: service",
    "Availability, latency and saturation of the service.",
    {
        "Now": [
            Panel("Throughput", "none", {"audio-seconds per second": "captioner:audio_seconds:rate5m"}, "stat"),
            Panel("Requests", "reqps", {"": "sum(captioner:requests:rate5m)"}, "stat"),
            Panel("Failed", "percentunit", {"": "captioner:errors:ratio_rate5m"}, "stat"),
            Panel("First token, p95", "s", quantiles(TTFT, at=(0.95,)), "stat"),
            Panel("Complete caption, p95", "s", quantiles(E2E, of='outcome=~"finished|partial"', at=(0.95,)), "stat"),
            Panel("Queued audio", "s", {"": "captioner:backlog_audio_seconds"}, "stat"),
            Panel("Ready processes", "none", {"": 'sum(captioner_ready{role!="engine"})'}, "stat"),
            Panel("In flight", "none", {"": "sum(captioner_requests_in_flight)"}, "stat"),
        ],
        "Objectives": [
            Panel(
                "Remaining error budget (3 days)",
                "percentunit",
                {"availability": "1 - captioner:errors:ratio_rate3d / 0.001"},
                about="Remaining fraction of the 0.1 % of requests that may fail.",
            ),
            Panel(
                "Burn rate (1 hour)",
                "none",
                {
                    "errors": "captioner:errors:ratio_rate1h / 0.001",
                    "first token, {{length}}": "captioner:ttft_slow:ratio_rate1h / 0.05",
                    "caption, {{length}}": "captioner:e2e_slow:ratio_rate1h / 0.05",
                },
                about="At 1 the month's budget lasts exactly a month; 14.4 pages.",
            ),
        ],
        "Traffic and errors": [
            Panel("Requests by outcome", "reqps", rate("captioner_requests_total", "outcome"), "stack"),
            Panel(
                "Requests by dialect and code",
                "reqps",
                {"{{dialect}} {{code}}": f"sum by (dialect, code) (rate(captioner_requests_total[{RATE}])) > 0"},
                "stack",
            ),
            Panel("Shed requests", "reqps", rate("captioner_requests_shed_total", "reason")),
            Panel("Refused by limits of callers", "reqps", rate("captioner_requests_rate_limited_total", "limit")),
        ],
        "Latency": [
            Panel("Time to the first token, by length of the audio", "s", quantiles(TTFT, "length")),
            Panel(
                "Time to the complete caption, by length of the audio",
                "s",
                quantiles(E2E, "length", of='outcome=~"finished|partial"'),
            ),
            Panel("Time per token", "s", quantiles("captioner_time_per_output_token_seconds")),
            Panel("Real-time factor", "none", quantiles("captioner_real_time_factor_ratio")),
        ],
        "Saturation": [
            Panel(
                "Saturation by resource",
                "percentunit",
                {"{{resource}}": "max by (resource) (captioner_saturation_ratio)"},
            ),
            Panel(
                "Queued audio",
                "s",
                {
                    "for a worker": "sum(captioner_audio_queue_audio_seconds)",
                    "for the engine": "sum(captioner_engine_waiting_audio_seconds)",
                },
                "stack",
            ),
        ],
    },
)

PIPELINE = Board(
    "captioner-audio",
    "Captioner: audio pipeline",
    "Time of a request by stage, and load of the audio workers.",
    {
        "Time by stage": [
            Panel("Share of each stage", "percentunit", {
                "{{stage}}": f"sum by (stage) (rate({STAGE}_sum[{RATE}])) "
                f"/ on () group_left () sum(rate({STAGE}_sum[{RATE}]))"
            }, "stack"),
            Panel("Each stage, p50", "s", quantiles(STAGE, "stage", at=(0.5,))),
            Panel("Each stage, p95", "s", quantiles(STAGE, "stage", at=(0.95,))),
            Panel("Mean of each stage", "s", {
                "{{stage}}": f"sum by (stage) (rate({STAGE}_sum[{RATE}])) "
                f"/ sum by (stage) (rate({STAGE}_count[{RATE}]))"
            }),
        ],
        "Audio": [
            Panel("Audio decoded and captioned", "none", {
                "decoded": "captioner:audio_decoded_seconds:rate5m",
                "captioned": "captioner:audio_seconds:rate5m",
            }, about="Audio-seconds per second."),
            Panel("Length of the audio", "s", quantiles("captioner_audio_duration_seconds", at=(0.5, 0.95, 0.99))),
            Panel("Uploads by code", "reqps", rate("captioner_uploads_total", "code")),
            Panel("Disk and memory", "bytes", {
                "uploads": "max(captioner_uploads_bytes)",
                "bodies": "sum(captioner_body_bytes)",
                "features": "sum(captioner_features_bytes)",
            }),
        ],
        "Audio workers": [
            Panel("Worker utilisation", "percentunit", {"{{instance}}": "captioner:audio_workers_busy:ratio5m"}),
            Panel("Busy workers", "none", {
                "busy": "sum(captioner_audio_workers_busy)",
                "all": "sum(captioner_audio_workers)",
            }),
            Panel("Clips queued for a worker", "none", {"{{instance}}": "captioner_audio_queue_depth"}),
            Panel("Worker deaths (15 min)", "none", {
                "{{instance}}": "increase(captioner_audio_worker_deaths_total[15m])"
            }),
        ],
        "Downloads": [
            Panel("Downloads running", "none", {"{{instance}}": "captioner_downloads_running"}),
            Panel("Download process deaths (15 min)", "none", {
                "{{instance}}": "increase(captioner_download_process_deaths_total[15m])"
            }),
        ],
    },
)  # fmt: skip

ENGINE = Board(
    "captioner-engine",
    "Captioner: engine",
    "Load and speed of the engines, and vLLM's own view.",
    {
        "Load": [
            Panel("Captions running and queued", "none", {
                "{{instance}} running": "captioner_engine_running",
                "{{instance}} queued": "captioner_engine_waiting",
            }),
            Panel("Audio running and queued", "s", {
                "{{instance}} running": "captioner_engine_running_audio_seconds",
                "{{instance}} queued": "captioner_engine_waiting_audio_seconds",
            }),
            Panel("Context reserved", "percentunit", {
                "{{instance}}": "captioner_engine_kv_tokens / (captioner_engine_kv_capacity_tokens > 0)"
            }),
            Panel("Steps", "ops", {"{{instance}}": f"rate(captioner_engine_steps_total[{RATE}])"}),
            Panel("Stalled", "s", {"{{instance}}": "captioner_engine_stalled_seconds"}),
        ],
        "Speed": [
            Panel("Queue for the engine", "s", quantiles(STAGE, of='stage="engine_queue"')),
            Panel("Prefill", "s", quantiles(STAGE, of='stage="prefill"')),
            Panel("Time per token", "s", quantiles("captioner_time_per_output_token_seconds")),
            Panel("Tokens as billed", "none", rate("captioner_tokens_total", "kind"), about="Per second."),
        ],
        "vLLM's own": [
            Panel("Requests in vLLM", "none", {
                "{{instance}} running": "vllm:num_requests_running",
                "{{instance}} waiting": "vllm:num_requests_waiting",
            }, about="Excludes captions queued before the engine, and audio work."),
            Panel("KV cache", "percentunit", {"{{instance}}": "vllm:kv_cache_usage_perc"}),
            Panel("Preemptions", "ops", {"{{instance}}": f"rate(vllm:num_preemptions_total[{RATE}])"}),
            Panel("Tokens", "none", {
                "prompt": f"sum(rate(vllm:prompt_tokens_total[{RATE}]))",
                "generation": f"sum(rate(vllm:generation_tokens_total[{RATE}]))",
            }, about="Per second, by the engine's own count."),
            Panel("Tokens per step", "none", quantiles("vllm:iteration_tokens_total")),
            Panel("Time between tokens", "s", quantiles("vllm:inter_token_latency_seconds")),
        ],
    },
)  # fmt: skip

TENANTS = Board(
    "captioner-tenants",
    "Captioner: tenants",
    "Usage, waits, refusals and cost by tenant.",
    {
        "Usage": [
            Panel("Audio-seconds per second", "none", rate("captioner_tenant_audio_seconds_total", "tenant"), "stack"),
            Panel("Requests", "reqps", {
                "{{tenant}} {{outcome}}": f"sum by (tenant, outcome) (rate(captioner_tenant_requests_total[{RATE}]))"
            }, "stack"),
            Panel("Tokens as billed", "none", rate("captioner_tenant_tokens_total", "tenant"), "stack"),
            Panel("Top 10 by audio in a day", "s", {
                "{{tenant}}": "topk(10, sum by (tenant) (increase(captioner_tenant_audio_seconds_total[1d])))"
            }),
        ],
        "Fairness and limits": [
            Panel("Mean wait in queues", "s", {
                "{{tenant}}": f"sum by (tenant) (rate(captioner_tenant_wait_seconds_total[{RATE}])) "
                f"/ (sum by (tenant) (rate(captioner_tenant_requests_total[{RATE}])) > 0)"
            }),
            Panel("Refused by limits", "reqps", {
                "{{tenant}} {{limit}}": "sum by (tenant, limit) "
                f"(rate(captioner_tenant_requests_rate_limited_total[{RATE}]))"
            }),
            Panel("Failed requests", "percentunit", {
                "{{tenant}}": "sum by (tenant) "
                f'(rate(captioner_tenant_requests_total{{outcome=~"failed|failed_midstream"}}[{RATE}])) '
                f"/ (sum by (tenant) (rate(captioner_tenant_requests_total[{RATE}])) > 0)"
            }),
        ],
        "Money": [
            Panel("Billed per hour", "none", {
                "{{tenant}} {{currency}}": "3600 * sum by (tenant, currency) "
                f"(rate(captioner_tenant_cost_total[{RATE}]))"
            }),
            Panel("Ledger lag", "s", {"{{instance}}": "captioner_ledger_lag_seconds"}),
            Panel("Ledger entries not in the database", "none", {"{{instance}}": "captioner_ledger_pending"}),
            Panel("Ledger journal", "bytes", {"{{instance}}": "captioner_ledger_journal_bytes"}),
            Panel("Ledger on its disk", "none", {
                "{{instance}} writable": "captioner_ledger_writable",
                "{{instance}} records in memory alone": "captioner_ledger_unrecorded",
            }),
        ],
    },
)  # fmt: skip

AUTOSCALING = Board(
    "captioner-autoscaling",
    "Captioner: autoscaling",
    "Number of frontends and engines, and the metrics that scale them.",
    {
        "Replicas": [
            Panel("Processes scraped", "none", {"{{role}}": 'count by (role) (up{job="captioner"} == 1)'}),
            Panel("Engine replicas", "none", {
                "known": "max(captioner_engine_replicas)",
                "ready": "max(captioner_engine_replicas_ready)",
            }),
            Panel("Replicas lost (15 min)", "none", {
                "{{replica}}": "max by (replica) (increase(captioner_replicas_lost_total[15m]))"
            }),
            Panel("Captions retried at another replica", "reqps", {
                "": f"sum(rate(captioner_engine_retries_total[{RATE}]))"
            }),
        ],
        "Scaling metrics": [
            Panel("Audio in flight per engine", "s", {
                "{{instance}}": "captioner_engine_running_audio_seconds + captioner_engine_waiting_audio_seconds"
            }, about="Another engine is started at `target_audio_seconds_per_engine`."),
            Panel("Clips per audio worker of a frontend", "none", {
                "{{instance}}": "(captioner_audio_workers_busy + captioner_audio_queue_depth) / captioner_audio_workers"
            }, about="Another frontend is started at `target_clips_per_audio_worker`."),
            Panel("Shed requests", "reqps", rate("captioner_requests_shed_total", "reason")),
        ],
        "Ray Serve's own": [
            Panel("Target replicas", "none", {
                "{{deployment}}": "max by (deployment) (ray_serve_autoscaling_target_replicas)"
            }),
            Panel("Healthy replicas", "none", {
                "{{deployment}}": "sum by (deployment) (ray_serve_deployment_replica_healthy)"
            }),
        ],
    },
)  # fmt: skip

CAPACITY = Board(
    "captioner-capacity",
    "Captioner: capacity",
    "Throughput of a machine, cost of an hour of audio, and free capacity.",
    {
        "Throughput": [
            Panel("Audio-seconds per second, per engine", "none", {
                "": "captioner:audio_seconds:rate5m / count(captioner_engine_kv_capacity_tokens > 0)"
            }),
            Panel("Audio captioned in a day", "s", {"": f"sum(increase({AUDIO}[1d]))"}),
            Panel("Concurrent captions per engine", "none", {"{{instance}}": "captioner_engine_running"}),
        ],
        "Cost": [
            Panel("CPU-seconds per hour of audio", "s", {"{{part}}": "captioner:cpu_seconds_per_audio_hour"}, "stack"),
            Panel("GPU-seconds per hour of audio", "s", {"": "captioner:gpu_seconds_per_audio_hour"}),
            Panel("CPU in use", "none", {
                "{{part}}": f"sum by (part) (rate(captioner_cpu_seconds_total[{RATE}]))"
            }, "stack", about="Cores."),
            Panel("Memory of each process", "bytes", {
                "{{instance}}": 'process_resident_memory_bytes{job="captioner"}'
            }),
        ],
        "Free capacity": [
            Panel("Free context", "percentunit", {
                "{{instance}}": "1 - captioner_engine_kv_tokens / (captioner_engine_kv_capacity_tokens > 0)"
            }),
            Panel("Free audio workers", "percentunit", {"{{instance}}": "1 - captioner:audio_workers_busy:ratio5m"}),
            Panel("Saturation by resource", "percentunit", {
                "{{resource}}": "max by (resource) (captioner_saturation_ratio)"
            }),
        ],
    },
)  # fmt: skip

BOARDS = (OVERVIEW, PIPELINE, ENGINE, TENANTS, AUTOSCALING, CAPACITY)
