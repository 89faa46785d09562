"""Load by Locust, at several loads, against any URL: throughput, latencies, goodput, stages, CPU and memory.

    python -m benchmarks.suite all [--url URL] [--out .cache/bench] [-- OPTIONS OF load/users.py]
    python -m benchmarks.suite sweep --loads 1 2 4 8 --rounds 2 …
    python -m benchmarks.suite saturate --low 1 --high 64 --slo-ttft-s 2 …
    python -m benchmarks.suite ceiling …

Without `--url` the suite starts this service with the embedded checkpoint, and stops it. `saturate` bisects for the
highest load whose p95 of TTFT meets the SLO with no request refused. `ceiling` measures the load generator against a
server that answers at once; a run that applied more than a fifth of the ceiling has a warning. `all` runs the three.

A run is JSON, on standard output or in OUT.json, and then with a page in OUT.html. A run with a wrong answer ends with
Locust's exit status (`load/users.py`) and without figures. A run that does not end (a server that sends a byte now and
then) is stopped after its seconds, twice the timeout of a request, and some minutes.
"""

from __future__ import annotations

import copy
import itertools
import json
import multiprocessing
import os
import socket
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
from aiohttp import web

from benchmarks.compare.systems import Captioner, Setup
from benchmarks.conditions import conditions, machine_load, portable
from benchmarks.load.command import locust_command, run_limit_s, run_locust
from benchmarks.load.stages import stage_sums
from benchmarks.load.wire import BASES
from benchmarks.processes import Family, Snapshot, memory_mib
from benchmarks.program import CHECKPOINT, option_parser, write_json
from benchmarks.report.baseline import breaches, differences
from benchmarks.report.page import page
from benchmarks.servers import free_port

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

EVERYTHING_REFUSED = 4
CEILING_CALLERS = 8
INSTANT = (
    *("--ways=openai-stream", f"--openai-base-url={BASES['openai']}", "--forms=data", "--tokens=0", "--least-s=0"),
    *("--usage-rule=any", "--probe-share=0", "--arrivals=closed", "--curve=constant"),
)
"""Options for the instant server, which override those of the run."""
LEAST_CEILING = 5
"""Least ratio of the generator's ceiling to the load that it applied; below, the generator may be what was measured."""
EMBEDDED_SAME_PAIRS = 0.05
"""The embedded model is small, and clips of noise and tones are much alike to it."""
NO_MARK = "CAPTIONER_BENCHMARK_MEMBER=of-nobody"
"""Mark of no process: only the process given and its children count."""

_RUNS = itertools.count()


def main() -> None:
    """Measure; print or write the results, and compare with a kept run."""
    options = _options()
    with ExitStack() as stack:
        commands = {}
        if not options.url and options.what != "ceiling":
            service = stack.enter_context(Captioner(Setup(CHECKPOINT, 0, 64)))
            options.url, options.family = service.url, service.family
            options.more.insert(0, f"--same-pairs={EMBEDDED_SAME_PAIRS}")
            commands = {service.name: portable(service.command)}
            run(options, options.loads[0])  # the first requests of a fresh process are not measured
        found = _measured(options, commands)
    if options.out:
        write_json(options.out.with_suffix(".json"), found)
        options.out.with_suffix(".html").write_text(page([found], found["title"]))
        print(f"{options.out}.json and {options.out}.html", *found["warnings"], sep="\n")
    else:
        print(json.dumps(found, indent=1))
    if options.check:
        kept = json.loads(options.check.read_text())
        for difference in differences(found, kept):
            print(difference, file=sys.stderr)
        if broken := breaches(found, kept, options.tolerance):
            sys.exit("\n".join(broken))


def _measured(options: argparse.Namespace, commands: dict[str, str]) -> dict[str, Any]:
    """Return the complete run, in the shape that `report/page.py` reads."""
    began = os.getloadavg()[0]
    closed = not any(of.startswith("--arrivals") for of in options.more)
    found: dict[str, Any] = {
        "kind": "suite",
        "title": options.title,
        "conditions": conditions(),
        "load_unit": "callers at a time" if closed else "requests per second offered",
        "slo_ttft_s": options.slo_ttft_s,
        "warnings": [],
    }
    wants = ("sweep", "saturate", "ceiling") if options.what == "all" else (options.what,)
    if "sweep" in wants:
        found["sweep"] = sweep(options)
    if "saturate" in wants:
        found["saturation"] = saturation(options)
    if "ceiling" in wants:
        found["ceiling"] = ceiling(options)
        measured = (*found.get("sweep", ()), *found.get("saturation", {}).get("tried", ()))
        if applied := max((of.get("requests_per_s", 0.0) for of in measured), default=0.0):
            for of in measured:
                most = found["ceiling"]["requests_per_s"] / LEAST_CEILING
                of["generator_bound"] = of.get("requests_per_s", 0.0) > most
            found["ceiling"]["times"] = times = round(found["ceiling"]["requests_per_s"] / applied, 2)
            if times < LEAST_CEILING:
                found["warnings"].append(
                    f"The load generator could do only {times} times what it applied: it may be what was measured."
                )
    found["conditions"] |= {
        "machine load": machine_load(began),
        "seconds of each run": f"{options.seconds:g}",
        "options of the load": " ".join(options.more) or "the locustfile's own",
        "commands": commands,
    }
    return found


def sweep(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Apply every load in turn, `--rounds` times; return the figures of each load, over all rounds and per round."""
    rounds: dict[float, list[dict[str, Any]]] = {load: [] for load in options.loads}
    lines: dict[float, list[dict[str, Any]]] = {load: [] for load in options.loads}
    for _ in range(options.rounds):
        for load in options.loads:
            rounds[load].append(run(options, load, lines[load]))
    found = []
    for load, of in rounds.items():
        together = summary(lines[load], options.slo_ttft_s, spans=len(of))
        for name in ("cpu_s_per_audio_hour", "memory_mib", "stages_s"):
            if by_round := [one[name] for one in of if name in one]:
                parts = dict.fromkeys(part for one in by_round for part in one)
                means = {part: float(np.mean([one.get(part, 0) for one in by_round])) for part in parts}
                together[name] = {part: round(mean, 5) for part, mean in means.items()}
        found.append({"load": load, **together, "rounds": of})
    return found


def run(options: argparse.Namespace, load: float, kept: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    """Return the figures at one load, and add the journal's lines to `kept`. Exits if an answer was wrong."""
    family = options.family
    number = next(_RUNS)
    with tempfile.TemporaryDirectory() as directory:
        journal = Path(directory, "journal")
        own = (f"--load={load}", f"--seconds={options.seconds}", f"--run-seed={time.time_ns() % 1_000_000}")
        command = locust_command(options.url, journal, *own, *options.more)
        stages = stage_sums(options.url)
        before = Snapshot.of(family) if family else None
        ended = run_locust(command, run_limit_s(command))
        use = before.until(Snapshot.of(family)) if family and before else None
        if ended.returncode not in (0, EVERYTHING_REFUSED):
            print(ended.stdout[-3000:], ended.stderr[-3000:], file=sys.stderr)
            lines = journal.read_text().splitlines() if journal.exists() else []
            print(*[line for line in lines if '"outcome": "right"' not in line][:10], sep="\n", file=sys.stderr)
            sys.exit(ended.returncode)
        entries = [json.loads(line) | {"run": number} for line in journal.read_text().splitlines()]
        after = stage_sums(options.url)
    if kept is not None:
        kept += entries
    found = {"load": load, **summary(entries, options.slo_ttft_s)}
    if answered := sum(one["outcome"] == "right" for one in entries):
        spent = {stage: (seconds - stages.get(stage, 0.0)) / answered for stage, seconds in after.items()}
        found["stages_s"] = {stage: round(seconds, 5) for stage, seconds in spent.items() if seconds > 0}
    if family and use and answered:
        # CPU time and audio are of the complete run, warm-up included.
        hours = sum(one["audio_s"] for one in entries if one["outcome"] == "right") / 3600
        found["cpu_s_per_audio_hour"] = {part: round(spent / hours, 1) for part, spent in use.cpu_s.items()}
        found["memory_mib"] = {part: round(mib) for part, mib in memory_mib(family).items()}
    return found


def summary(entries: Sequence[dict[str, Any]], slo_ttft_s: float, spans: int = 1) -> dict[str, Any]:
    """Summarise the entries of journals of `spans` runs, without the warm-up.

    Time is from the first request of a run to its last answer. Raises `ValueError` for entries of more runs.
    """
    measured = [one for one in entries if not one["warm_up"]]
    right = [one for one in measured if one["outcome"] == "right"]
    if not right:
        return {"requests": len(measured), "right": 0, "meets_slo": False}
    runs = [[one for one in measured if one.get("run") == number] for number in {one.get("run") for one in measured}]
    if len(runs) > spans:
        raise ValueError(f"entries of {len(runs)} runs, expected {spans}")
    wall_s = sum(max(one["ended"] for one in of) - min(one["due"] for one in of) for of in runs)
    # An answer that is not streamed has its first text with its last.
    first_s = [one.get("ttft_s", one["e2e_s"]) for one in right]
    within = sum(of <= slo_ttft_s for of in first_s)
    found: dict[str, Any] = {"requests": len(measured), "right": len(right), "wall_s": round(wall_s, 3)}
    found |= {
        "requests_per_s": round(len(right) / wall_s, 3),
        "audio_s_per_s": round(sum(one["audio_s"] for one in right) / wall_s, 2),
        "goodput": round(within / len(measured), 4),
        "meets_slo": len(right) == len(measured) and float(np.percentile(first_s, 95)) <= slo_ttft_s,
    }
    for name in ("ttft_s", "itl_s", "e2e_s", "late_s"):
        if values := [one[name] for one in right if name in one]:
            found[name] = {f"p{at}": round(float(np.percentile(values, at)), 4) for at in (50, 90, 95, 99)}
    return found


def saturation(options: argparse.Namespace) -> dict[str, Any]:
    """Bisect on a logarithmic scale until both bounds are within `--within` of each other."""
    tried = []
    low, high = options.low, options.high
    for load in (low, high):
        tried.append(one := run(options, load))
        if one["meets_slo"] == (load == high):
            return {"highest_load": high if load == high else None, "tried": tried}
    while high / low > 1 + options.within:
        middle = round((low * high) ** 0.5, 3)
        tried.append(one := run(options, middle))
        low, high = (middle, high) if one["meets_slo"] else (low, middle)
    return {"highest_load": low, "tried": tried}


def ceiling(options: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of one generator process against a server that answers at once."""
    port = free_port()
    server = multiprocessing.get_context("spawn").Process(target=serve_instantly, args=(port,), daemon=True)
    server.start()
    deadline = time.monotonic() + 60
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            break
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
    own = copy.copy(options)
    own.url, own.family = f"http://127.0.0.1:{port}", None
    own.more = [*options.more, *INSTANT]
    try:
        return run(own, CEILING_CALLERS)
    finally:
        server.terminate()
        server.join()


def serve_instantly(port: int) -> None:
    """Serve the OpenAI dialect, streamed, without delay: 16 pieces of text, different in every answer."""
    number = iter(range(1 << 60))

    async def answer(request: web.Request) -> web.Response:
        await request.read()
        id_ = str(next(number))
        words = ["A bell rings ", id_, *(f" and {of}" for of in "abcdefghijklmn")]
        events: list[Any] = [{"choices": [{"delta": {"content": word}, "finish_reason": None}]} for word in words]
        events.append({"choices": [{"delta": {}, "finish_reason": "stop"}]})
        usage = {"prompt_tokens": 33, "completion_tokens": 16, "total_tokens": 49}
        events.append({"choices": [], "usage": usage})
        body = "".join(f"data: {json.dumps({'id': id_} | event)}\n\n" for event in events) + "data: [DONE]\n\n"
        return web.Response(text=body, content_type="text/event-stream")

    app = web.Application(client_max_size=1 << 26)
    app.router.add_post("/{path:.*}", answer)
    web.run_app(app, host="127.0.0.1", port=port, print=None)


def _options() -> argparse.Namespace:
    parser = option_parser(__doc__)
    parser.add_argument("what", choices=("all", "sweep", "saturate", "ceiling"))
    parser.add_argument("--url", default="", help="a running server; without it this service is started")
    parser.add_argument("--loads", type=float, nargs="+", default=[1, 4, 16, 32])
    parser.add_argument("--rounds", type=int, default=2, help="runs of each load in `sweep`")
    parser.add_argument("--seconds", type=float, default=15)
    parser.add_argument("--slo-ttft-s", type=float, default=2.0, help="p95 of the time to the first text")
    parser.add_argument("--low", type=float, default=2)
    parser.add_argument("--high", type=float, default=64)
    parser.add_argument("--within", type=float, default=0.2, help="precision of `saturate`: 0.2 is 20 %%")
    parser.add_argument("--pid", type=int, help="the server's process on this machine, to measure its CPU and memory")
    parser.add_argument("--out", type=Path, help="path of JSON and page, without suffix")
    parser.add_argument("--title", default="One service at several loads")
    parser.add_argument("--check", type=Path, help="a kept run's JSON: exit with a status other than 0 if worse")
    parser.add_argument("--tolerance", type=float, default=0.25, help="tolerated degradation: 0.25 is 25 %%")
    own = sys.argv[1 : sys.argv.index("--")] if "--" in sys.argv else sys.argv[1:]
    options = parser.parse_args(own)
    if options.check and options.what not in ("all", "sweep"):
        parser.error(f"--check needs a sweep; {options.what} has none")
    options.more = sys.argv[len(own) + 2 :]
    options.family = Family(psutil.Process(options.pid), NO_MARK) if options.pid else None
    return options


if __name__ == "__main__":
    main()
