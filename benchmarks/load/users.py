"""The Locust user: requests captions in both dialects, streamed and not; every answer is checked (`checks.py`).

    locust --headless -f benchmarks/load/locustfile.py --host http://127.0.0.1:8000 --arrivals poisson --load 4 …

`python -m benchmarks.load.users` lists all options, those of this user under "captions" (Locust's own `--help` does not
load the file); ../README.md has examples. Locust reports each figure as an entry: `E2E`, `TTFT` and `ITL` (mean time
between the tokens of one answer) in ms, and `audio`, where "ms" is the audio of a right answer: its sum over time is
audio-seconds per second. `--journal` gets a line of JSON for each request; reports are made from it.

In an open loop each request is due at a moment that is fixed beforehand, and every figure counts from then: neither a
slow server nor a late generator can postpone what it is measured by.

The exit status is 3 if an answer was wrong or an error was not a clear refusal for overload, 4 if no answer was right.
"""

from __future__ import annotations

import itertools
import time
from typing import TYPE_CHECKING, Any

import gevent
from locust import User, events, task
from locust.argument_parser import get_parser
from locust.runners import WorkerRunner

from benchmarks.load.checks import FAILED, WRONG, BadAnswerError
from benchmarks.load.clips import CODECS, LENGTHS_S
from benchmarks.load.command import STOP_MARGIN_S, TIMEOUT_S
from benchmarks.load.run import CONNECTIONS, FORMS, WAYS, Request, Run, bank, digest, fire
from benchmarks.load.shapes import CURVES
from benchmarks.load.wire import BASES, MODEL_NAME

if TYPE_CHECKING:
    from collections.abc import Iterator


@events.init_command_line_parser.add_listener  # type: ignore[untyped-decorator]
def _add_options(parser: Any) -> None:
    group = parser.add_argument_group("captions")
    add = group.add_argument
    add("--model", default=MODEL_NAME)
    add("--ways", default="openai-stream", help=f"of {','.join(WAYS)}: each as often as the others")
    add("--tokens", type=int, default=0, help="length of every caption by ignore_eos; 0: the model ends it")
    add("--usage-rule", choices=("manual", "model", "any"), default="manual", help="rule for the count of input tokens")
    add("--openai-base-url", default=BASES["openai"], help="a complete URL, or a path at the host")
    add("--dashscope-base-url", default=BASES["dashscope"], help="a complete URL, or a path at the host")
    add("--least-s", type=float, default=0, help="a faster answer is taken for one from a cache")
    add("--caption-words", type=int, default=0, help="words, each a token, of every caption of a fake engine; 0: any")
    add("--mix", default="30=1", help=f"lengths=weight,…: a sort of {','.join(LENGTHS_S)}, or seconds")
    add("--codecs", default="mp3", help=f"of {','.join(CODECS)}")
    add("--forms", default="data", help=f"of {','.join(FORMS)}")
    add("--clips-dir", default=".cache/benchmark-clips", help="for the sounds of clips, and for clips behind URLs")
    add("--clips-url", default="http://127.0.0.1:9999", help="URL at which the server reaches --clips-dir")
    add("--same-pairs", type=float, default=0, help="share of pairs of clips that may get the same caption")
    add(
        "--clips-per-length", type=int, default=0, help="send this many clips of each length over and over; 0: new ones"
    )
    add("--run-seed", type=int, default=0, help="runs of different seeds have different clips")
    add("--connections", choices=CONNECTIONS, default="keep-alive", help="both: every other caller opens one a request")
    add("--arrivals", choices=("closed", "even", "poisson"), default="closed")
    add("--max-pause-s", type=float, default=0, help="longest pause of a closed-loop caller, from 0.05 s; 0: none")
    add("--user-rate", type=float, default=0.1, help="requests per second of each user of an open loop")
    add("--curve", choices=CURVES, default="constant", help="curve of the load over time")
    add("--load", type=float, default=4, help="callers of a closed loop, or requests per second of an open one")
    add("--levels", default="1,2,4,8", help="loads of --curve steps")
    add("--burst-s", type=float, default=5, help="length of each burst of --curve bursts, and of each pause")
    add("--seconds", type=float, default=60)
    add("--warm-up", type=float, default=5, help="seconds before that, which count only if an answer is wrong")
    add("--probe-share", type=float, default=0.02, help="share of clips that are sent again, to find caches")
    add("--timeout-s", type=float, default=TIMEOUT_S, help="longest silence of a server within an answer")
    add("--journal", default="", help="file to which a line of JSON is added for each request")
    add("--journal-sent", action="store_true", help="add a line before each request, too, to find requests without end")


class Caller(User):  # type: ignore[misc]
    """Requests one caption after another in a closed loop; at its rate, without waiting for answers, in an open one."""

    connections: Iterator[str] = itertools.cycle(("keep-alive", "close"))

    def on_start(self) -> None:
        """Start at a random moment between two requests, so that all users together have their rate from the start."""
        self.run_ = _running()
        options = self.run_.options
        self.connection = next(self.connections) if options.connections == "both" else options.connections
        self.closed = options.arrivals == "closed"
        self.due = 0.0 if self.closed else time.time() + self._gap(self.run_.random.random())
        self.next: Request | None = None

    def wait_time(self) -> float:
        """Return the time until the next request is due."""
        if self.closed and self.run_.options.max_pause_s:
            return self.run_.random.uniform(0.05, max(0.05, self.run_.options.max_pause_s))
        return max(0.0, self.due - time.time())

    @task  # type: ignore[untyped-decorator]
    def request_caption(self) -> None:
        """Request a caption; in an open loop, send the prepared request without waiting and prepare the next."""
        run = self.run_
        if self.closed:
            # In another greenlet: Locust may kill this user during its pause, after the next request has started.
            run.in_flight.spawn(_exchange, run, Request(run, self.connection), time.time()).get()
            return
        if self.next:
            run.in_flight.spawn(_exchange, run, self.next, self.due)
            self.due += self._gap(1)
        self.next = Request(run, self.connection)

    def on_stop(self) -> None:
        """Remove the clip of a request that was never due."""
        if self.next:
            self.next.drop()

    def _gap(self, even: float) -> float:
        """Return the seconds until the next request; in a Poisson process they do not depend on the last request."""
        rate = self.run_.options.user_rate
        return even / rate if self.run_.options.arrivals == "even" else self.run_.random.expovariate(rate)


def _exchange(run: Run, request: Request, due: float) -> None:
    """Send a request and note its outcome. Times count from when the request was due."""
    sent, number = time.time(), f"{run.worker}-{next(run.numbers)}"
    about = {"number": number} | request.about | {"due": round(due, 4), "sent": round(sent, 4)}
    about |= {"late_s": round(sent - due, 4), "warm_up": due < run.measured_from}
    if run.options.journal_sent:
        run.note(number=number, sent=sent)
    outcome: dict[str, Any] = {"outcome": FAILED, "detail": "an error of the load generator: see its log"}
    try:
        answer = request.answer(run)
    except BadAnswerError as bad:
        outcome = {"outcome": bad.kind, "detail": bad.detail[:300]}
        outcome |= {"cause": bad.cause, "status": bad.status, "request_id": bad.request_id}
        fire(run, "E2E", request.way, time.time() - due, bad)
    except gevent.GreenletExit:
        outcome = {"outcome": "abandoned"}
        raise
    else:
        times = {name: value for name in ("itl_s", "stall_s") if (value := getattr(answer, name)) is not None}
        times["e2e_s"] = sent - due + answer.e2e_s
        if answer.ttft_s is not None:
            times["ttft_s"] = sent - due + answer.ttft_s
        outcome = {"outcome": "right", "text": digest(answer.text), "tokens": answer.output_tokens}
        outcome |= {"request_id": answer.request_id} | {name: round(value, 4) for name, value in times.items()}
        if not about["warm_up"]:
            fire(run, "audio", request.way, request.clip.audio_s)
            for entry, name in (("E2E", "e2e_s"), ("TTFT", "ttft_s"), ("ITL", "itl_s")):
                if name in times:
                    fire(run, entry, request.way, times[name])
    finally:
        run.note(**about, **outcome, ended=round(time.time(), 4))
        request.drop()


_run: Run | None = None


def _running() -> Run:
    if _run is None:
        raise RuntimeError("no test is running")
    return _run


@events.init.add_listener  # type: ignore[untyped-decorator]
def _prepare(environment: Any, **_: Any) -> None:
    """Encode the sounds of the clips before the run."""
    bank(environment.parsed_options.clips_dir, environment.parsed_options.codecs)


@events.test_start.add_listener  # type: ignore[untyped-decorator]
def _start(environment: Any, **_: Any) -> None:
    global _run  # noqa: PLW0603 - Locust makes the users, and passes them nothing but the environment
    environment.stop_timeout = environment.parsed_options.timeout_s + STOP_MARGIN_S
    _run = Run(environment)


@events.test_stop.add_listener  # type: ignore[untyped-decorator]
def _wait_for_last_answers(environment: Any, **_: Any) -> None:
    """Wait for answers of an open loop after the last user has stopped; a worker reports them before it ends."""
    if _run is not None:
        _run.in_flight.join(_run.options.timeout_s)
        _run.in_flight.kill()
    environment.stop_timeout = 0.0  # a worker would sleep for this time


@events.report_to_master.add_listener  # type: ignore[untyped-decorator]
def _report(data: dict[str, Any], **_: Any) -> None:
    """Send the master the captions, in which it finds repeats that no single worker can notice."""
    if _run is not None:
        data["captioned"], _run.unreported = _run.unreported, []


@events.worker_report.add_listener  # type: ignore[untyped-decorator]
def _compare(data: dict[str, Any], **_: Any) -> None:
    if _run is None:
        return  # from a worker of an earlier run, which is ending
    run = _run
    for caption, clip, id_ in data.get("captioned", ()):
        try:
            run.seen.check(caption, clip, id_)
        except BadAnswerError as bad:
            now = round(time.time(), 4)
            about = {"way": "all workers", "clip": clip, "audio_s": 0.0, "due": now, "ended": now, "warm_up": True}
            run.note(**about, outcome=bad.kind, detail=bad.detail)
            fire(run, "E2E", "all workers", 0.0, bad)


@events.quitting.add_listener  # type: ignore[untyped-decorator]
def _set_exit_status(environment: Any, **_: Any) -> None:
    if isinstance(environment.runner, WorkerRunner):
        environment.process_exit_code = 0  # it has only what it has not reported yet; the master decides
        return
    kinds = [str(entry.error) for entry in environment.stats.errors.values()]
    total = environment.stats.total
    if any(kind in error for error in kinds for kind in (*WRONG, FAILED)):
        environment.process_exit_code = 3
    else:
        environment.process_exit_code = 0 if total.num_requests > total.num_failures else 4


if __name__ == "__main__":
    get_parser(default_config_files=[]).print_help()
