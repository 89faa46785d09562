"""Load by Locust, at several loads, against any URL: throughput, latencies, goodput, CPU and memory.

    python benchmarks/suite.py sweep --url URL --loads 1 2 4 8 [--pid PID] [-- OPTIONS OF locustfile.py]
    python benchmarks/suite.py saturate --url URL --low 1 --high 64 --slo-ttft-s 2 [-- …]
    python benchmarks/suite.py ceiling [-- …]

`saturate` bisects for the highest load whose p95 of TTFT meets the SLO with nothing refused. `ceiling` measures what
the generator can do against a server that answers at once. Each writes JSON to standard output. A run with one wrong
answer ends with its exit status and without figures.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
from aiohttp import web
from processes import Family, Snapshot, memory_mib

if TYPE_CHECKING:
    from collections.abc import Sequence

LOCUSTFILE = Path(__file__).with_name("locustfile.py")
EVERYTHING_REFUSED = 4
CEILING_CALLERS = 8
LATENCIES = ("ttft_s", "e2e_s")
NO_MARK = "CAPTIONER_BENCHMARK_MEMBER=of-nobody"
"""Only the process and its children count."""


def main() -> None:
    """Measure, and print what was found."""
    options = _options()
    found: Any
    if options.what == "sweep":
        found = [run(options, load) for load in options.loads]
    elif options.what == "saturate":
        found = saturation(options)
    else:
        found = ceiling(options)
    print(json.dumps(found, indent=1))
    if options.check and (broken := breaches(found, json.loads(options.check.read_text()), options.tolerance)):
        sys.exit("\n".join(broken))


def breaches(found: Sequence[dict[str, Any]], kept: Sequence[dict[str, Any]], tolerance: float) -> list[str]:
    """Where a sweep is worse than a kept one, in ratios at the same load. Raises `ValueError` if they share none."""
    before = {one["load"]: one for one in kept}
    if not any(one["load"] in before for one in found):
        raise ValueError("the baseline has none of these loads")
    told = []
    for one in found:
        if not (base := before.get(one["load"])):
            continue
        if base["meets_slo"] and not one["meets_slo"]:
            told.append(f"load {one['load']}: the SLO is not met any more")
        if base["right"] and not one["right"]:
            told.append(f"load {one['load']}: no right answer any more")
            continue
        if not base["right"]:
            continue
        ratios = {"audio_s_per_s": base["audio_s_per_s"] / one["audio_s_per_s"]}
        ratios |= {f"{name} p95": one[name]["p95"] / base[name]["p95"] for name in LATENCIES if name in base}
        told += [
            f"load {one['load']}: {name} is {ratio:.2f} times worse"
            for name, ratio in ratios.items()
            if ratio > 1 + tolerance
        ]
    return told


def run(options: argparse.Namespace, load: float) -> dict[str, Any]:
    """Figures at one load. Exits if an answer was wrong."""
    family = Family(psutil.Process(options.pid), NO_MARK) if options.pid else None
    with tempfile.TemporaryDirectory() as directory:
        journal = Path(directory, "journal")
        command = [sys.executable, "-m", "locust", "--headless", "--only-summary", "-f", str(LOCUSTFILE)]
        command += [f"--host={options.url}", f"--load={load}", f"--seconds={options.seconds}", f"--journal={journal}"]
        command += [f"--run-seed={time.time_ns() % 1_000_000}", *options.more]
        before = Snapshot.of(family) if family else None
        ended = subprocess.run(command, check=False, capture_output=True, text=True)
        use = before.until(Snapshot.of(family)) if family and before else None
        if ended.returncode not in (0, EVERYTHING_REFUSED):
            print(ended.stdout[-3000:], ended.stderr[-3000:], file=sys.stderr)
            sys.exit(ended.returncode)
        told = [json.loads(line) for line in journal.read_text().splitlines()]
    found = {"load": load, **summary(told, options.slo_ttft_s)}
    if family and use:
        # Both are of the whole run, warm-up included.
        hours = sum(one["audio_s"] for one in told if one["outcome"] == "right") / 3600
        found["cpu_s_per_audio_hour"] = {part: round(spent / hours, 1) for part, spent in use.cpu_s.items()}
        found["memory_mib"] = {part: round(mib) for part, mib in memory_mib(family).items()}
    return found


def summary(told: Sequence[dict[str, Any]], slo_ttft_s: float) -> dict[str, Any]:
    """What the lines of a journal come to, warm-up apart. Time is from the first request to the last answer."""
    measured = [one for one in told if not one["warm_up"]]
    right = [one for one in measured if one["outcome"] == "right"]
    if not right:
        return {"requests": len(measured), "right": 0, "meets_slo": False}
    wall_s = max(one["ended"] for one in measured) - min(one["due"] for one in measured)
    # Where nothing is streamed, the first text is there with the last.
    first_s = [one.get("ttft_s", one["e2e_s"]) for one in right]
    within = sum(of <= slo_ttft_s for of in first_s)
    found: dict[str, Any] = {"requests": len(measured), "right": len(right), "wall_s": round(wall_s, 3)}
    found |= {
        "requests_per_s": round(len(right) / wall_s, 3),
        "audio_s_per_s": round(sum(one["audio_s"] for one in right) / wall_s, 2),
        "goodput": round(within / len(measured), 4),
        "meets_slo": len(right) == len(measured) and float(np.percentile(first_s, 95)) <= slo_ttft_s,
    }
    for name in ("ttft_s", "itl_s", "e2e_s"):
        if values := [one[name] for one in right if name in one]:
            found[name] = {f"p{at}": round(float(np.percentile(values, at)), 4) for at in (50, 90, 95, 99)}
    return found


def saturation(options: argparse.Namespace) -> dict[str, Any]:
    """Bisect, on a logarithmic scale, until both sides are within `--within` of each other."""
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
    """What one generator process can do at most."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = multiprocessing.get_context("spawn").Process(target=instant, args=(port,), daemon=True)
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
    options.url, options.pid = f"http://127.0.0.1:{port}", None
    options.more = [*options.more, "--usage-rule=any", "--probe-share=0"]
    try:
        return run(options, CEILING_CALLERS)
    finally:
        server.terminate()
        server.join()


def instant(port: int) -> None:
    """Serve the OpenAI dialect, streamed, at once: 16 pieces of text, and what was said is never the same."""
    number = iter(range(1 << 60))

    async def answer(request: web.Request) -> web.Response:
        await request.read()
        words = ["A bell rings ", str(next(number)), *(f" and {of}" for of in "abcdefghijklmn")]
        events: list[Any] = [{"choices": [{"delta": {"content": word}, "finish_reason": None}]} for word in words]
        events.append({"choices": [{"delta": {}, "finish_reason": "stop"}]})
        usage = {"prompt_tokens": 33, "completion_tokens": 16, "total_tokens": 49}
        events.append({"choices": [], "usage": usage})
        body = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
        return web.Response(text=body, content_type="text/event-stream")

    app = web.Application(client_max_size=1 << 26)
    app.router.add_post("/{path:.*}", answer)
    web.run_app(app, host="127.0.0.1", port=port, print=None)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("sweep", "saturate", "ceiling"))
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--loads", type=float, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--slo-ttft-s", type=float, default=2.0, help="p95 of the time to the first text")
    parser.add_argument("--low", type=float, default=1)
    parser.add_argument("--high", type=float, default=64)
    parser.add_argument("--within", type=float, default=0.1, help="how near `saturate` comes: 0.1 is 10 %%")
    parser.add_argument("--pid", type=int, help="the server's process, if it runs here: its CPU and memory are told")
    parser.add_argument("--check", type=Path, help="a kept sweep's JSON: exit with a status other than 0 if worse")
    parser.add_argument("--tolerance", type=float, default=0.25, help="how much worse is let pass: 0.25 is 25 %%")
    own = sys.argv[1 : sys.argv.index("--")] if "--" in sys.argv else sys.argv[1:]
    options = parser.parse_args(own)
    if options.check and options.what != "sweep":
        parser.error("--check is for sweep")
    options.more = sys.argv[len(own) + 2 :]
    return options


if __name__ == "__main__":
    main()
