"""Load by Locust: captions asked for in both dialects, whole and streamed; every answer is checked (wire.py).

    locust --headless -f benchmarks/locustfile.py --host http://127.0.0.1:8000 --arrivals poisson --load 4 …

`locust -f benchmarks/locustfile.py --help` lists the options under "captions"; README.md has examples. Locust tells
each figure as an entry of its own: `E2E`, `TTFT` and `ITL` (mean time between the tokens of one answer) in ms, and
`audio`, where "ms" is the audio of a right answer: its sum over time is audio-seconds per second. `--journal` gets a
line of JSON for each request, which is what a report is made of.

In an open loop each request is due at a moment that is set beforehand, and every figure counts from then: a server that
is slow, or a generator that is late, cannot put off what it would be measured by.

The exit status is 3 if an answer was wrong or an error came that is not a clear "too much", 4 if none was right.
"""

from __future__ import annotations

import base64
import json
import os
import random
import sys
import time
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import gevent
import requests
from gevent.pool import Pool
from geventhttpclient import HTTPClient
from locust import User, events, task

sys.path.insert(0, str(Path(__file__).parent))  # Locust does not, in its workers

from clips import CODECS, LENGTHS_S, Bank
from shapes import CURVES, Shape
from wire import BASES, FAILED, WRONG, Asked, BadAnswerError, Call, Seen, call, read

if TYPE_CHECKING:
    import argparse

    from wire import Answer, Dialect

__all__ = ["Caller", "Shape"]

WAYS: dict[str, tuple[Dialect, bool]] = {
    "openai-stream": ("openai", True),
    "openai": ("openai", False),
    "dashscope-stream": ("dashscope", True),
    "dashscope": ("dashscope", False),
}
FORMS = ("data", "base64", "url", "upload")
TIMEOUT_S = 900
PROBED_FROM_S = 0.2
"""Times of faster answers say nothing of a cache: a pause of the machine is as long."""
IN_THREAD_S = 60
"""Clips from this length on are spliced in a thread: it takes up to half a second, and others are to be sent then."""


@events.init_command_line_parser.add_listener  # type: ignore[untyped-decorator]
def _options(parser: Any) -> None:
    group = parser.add_argument_group("captions")
    add = group.add_argument
    add("--model", default="qwen3-omni-30b-a3b-captioner")
    add("--ways", default="openai-stream", help=f"of {','.join(WAYS)}: each as often as the others")
    add("--tokens", type=int, default=0, help="length of every caption by ignore_eos; 0: as it comes")
    add("--usage-rule", choices=("manual", "model", "any"), default="manual", help="what input tokens must be")
    add("--openai-base-url", default=BASES["openai"], help="a whole URL, or a path at the host")
    add("--dashscope-base-url", default=BASES["dashscope"], help="a whole URL, or a path at the host")
    add("--least-s", type=float, default=0, help="an answer that comes sooner is taken for a cache's")
    add("--mix", default="30=1", help=f"lengths=weight,…: a sort of {','.join(LENGTHS_S)}, or seconds")
    add("--codecs", default="mp3", help=f"of {','.join(CODECS)}")
    add("--forms", default="data", help=f"of {','.join(FORMS)}")
    add("--clips-dir", default=".cache/benchmark-clips", help="for what clips are made of, and clips behind URLs")
    add("--clips-url", default="http://127.0.0.1:9999", help="where the server reaches --clips-dir")
    add("--same-pairs", type=float, default=0, help="share of pairs of clips that may get the same caption")
    add("--run-seed", type=int, default=0, help="runs of different seeds have different clips")
    add("--arrivals", choices=("closed", "even", "poisson"), default="closed")
    add("--user-rate", type=float, default=0.1, help="requests per second of each user of an open loop")
    add("--curve", choices=CURVES, default="constant", help="how the load changes over time")
    add("--load", type=float, default=4, help="callers of a closed loop, or requests per second of an open one")
    add("--levels", default="1,2,4,8", help="loads of --curve steps")
    add("--burst-s", type=float, default=5, help="how long each burst of --curve bursts is, and each pause")
    add("--seconds", type=float, default=60)
    add("--warm-up", type=float, default=5, help="seconds before that, which count only if an answer is wrong")
    add("--probe-share", type=float, default=0.02, help="share of clips that are sent again, to find caches")
    add("--journal", default="", help="file to add a line of JSON to for each request")


class _Run:
    """What the users of one process share."""

    def __init__(self, environment: Any) -> None:
        options: argparse.Namespace = environment.parsed_options
        self.events = environment.events
        self.options = options
        self.asked = Asked(options.model, options.tokens or None, options.usage_rule, options.least_s)
        self.bank = _bank(options.clips_dir, options.codecs)
        self.seen = Seen(options.same_pairs)
        self.under_way = Pool()
        self.measured_from = time.time() + options.warm_up
        host = environment.host.rstrip("/")
        bases: dict[Dialect, str] = {"openai": options.openai_base_url, "dashscope": options.dashscope_base_url}
        self.servers = {
            dialect: Server(base if base.startswith("http") else host + base) for dialect, base in bases.items()
        }
        self.journal = Path(options.journal or os.devnull).open("a", buffering=1)  # noqa: SIM115 - until the process ends
        # Each worker has clips of its own.
        worker = max(0, getattr(environment.runner, "worker_index", 0))
        self.random = random.Random(f"{options.run_seed}.{worker}")
        self._seed = (options.run_seed * 1000 + worker) * 1_000_000
        self.keys = weights(os.environ.get("BENCHMARK_KEYS", ""))
        self.unreported: list[tuple[str, int, str]] = []

    def make_clip(self) -> Clip:
        """One that nobody has had."""
        self._seed += 1
        sort = _draw(self.random, weights(self.options.mix))
        low, high = LENGTHS_S.get(sort) or (float(sort), float(sort))
        codec = self.random.choice(self.options.codecs.split(","))
        wanted = (codec, low * (high / low) ** self.random.random(), self._seed)
        if wanted[1] < IN_THREAD_S:
            data, audio_s = self.bank.clip(*wanted)
        else:
            data, audio_s = gevent.get_hub().threadpool.apply(self.bank.clip, wanted)
        return Clip(self._seed, sort, codec, audio_s, data)

    def note(self, **values: Any) -> None:
        self.journal.write(json.dumps(values) + "\n")


class Server:
    """Where one dialect is spoken."""

    def __init__(self, base: str) -> None:
        self.base = base.rstrip("/")
        self._path = urlsplit(self.base).path
        self._client = HTTPClient.from_url(
            self.base, concurrency=100_000, connection_timeout=30, network_timeout=TIMEOUT_S
        )

    def send(self, request: Call, *, stream: bool) -> Answer:
        """Send a request and read its answer. Raises `BadAnswerError`."""
        began = time.perf_counter()
        try:
            response = self._client.request("POST", self._path + request.path, request.body, request.headers)
            pieces = []
            while stream and (event := response.readline(b"\n\n")):
                pieces.append((time.perf_counter() - began, bytes(event)))
            if rest := response.read():
                pieces.append((time.perf_counter() - began, bytes(rest)))
        except (OSError, ValueError) as error:  # the client's own errors among them
            raise BadAnswerError(FAILED, f"connection: {error!r}") from error
        headers = {name.lower(): str(value) for name, value in response.items()}
        return read(response.status_code, headers, pieces, time.perf_counter() - began, stream=stream)


class Clip:
    """One audio, as a file and as it is handed over."""

    def __init__(self, seed: int, sort: str, codec: str, audio_s: float, data: bytes) -> None:
        self.seed, self.sort, self.codec, self.audio_s, self.data = seed, sort, codec, audio_s, data
        self.served: Path | None = None

    def given(self, form: str, run: _Run, key: str) -> bytes:
        """What stands in the request."""
        if form == "url":
            self.served = Path(run.options.clips_dir, f"served-{self.seed}.{self.codec}")
            self.served.write_bytes(self.data)
            return f"{run.options.clips_url}/{self.served.name}".encode()
        if form == "upload":
            return self._upload(run, key)
        prefix = f"data:audio/{self.codec};base64," if form == "data" else ""
        return prefix.encode() + base64.b64encode(self.data)

    def drop(self) -> None:
        """Take it from where it was served."""
        if self.served:
            self.served.unlink(missing_ok=True)

    def _upload(self, run: _Run, key: str) -> bytes:
        """The way of DashScope's SDKs: ask for a policy, post the file."""
        began = time.perf_counter()
        asked = {"action": "getPolicy", "model": run.options.model}
        url = f"{run.servers['dashscope'].base}/uploads"
        told = requests.get(url, asked, headers={"authorization": f"Bearer {key}"}, timeout=60)
        policy = told.json()["data"]
        name = f"{policy['upload_dir']}/{self.seed}.{self.codec}"
        fields = {
            "OSSAccessKeyId": policy["oss_access_key_id"],
            "Signature": policy["signature"],
            "policy": policy["policy"],
            "key": name,
            "x-oss-object-acl": policy["x_oss_object_acl"],
            "x-oss-forbid-overwrite": policy["x_oss_forbid_overwrite"],
            "success_action_status": "200",
        }
        requests.post(policy["upload_host"], fields, files={"file": self.data}, timeout=300).raise_for_status()
        _fire(run, "upload", self.codec, time.perf_counter() - began)
        return f"oss://{name}".encode()


class Caller(User):  # type: ignore[misc]
    """In a closed loop asks for one caption after another; in an open one asks at its rate, whatever comes back."""

    def on_start(self) -> None:
        """Begin anywhere in the time between two requests, so that all together ask at their rate from the start."""
        self.run_ = _running()
        self.closed = self.run_.options.arrivals == "closed"
        self.due = 0.0 if self.closed else time.time() + self._gap(self.run_.random.random())
        self.next: Request | None = None

    def wait_time(self) -> float:
        """Time until the next request is due."""
        return max(0.0, self.due - time.time())

    @task  # type: ignore[untyped-decorator]
    def ask(self) -> None:
        """Ask for one caption. In an open loop do not wait for it, but make the next request until that one is due."""
        run = self.run_
        if self.closed:
            _ask(run, Request(run), time.time())
            return
        if self.next:
            run.under_way.spawn(_ask, run, self.next, self.due)
            self.due += self._gap(1)
        self.next = Request(run)

    def _gap(self, even: float) -> float:
        """Seconds until one more is due; how long it was since the last one tells nothing in Poisson's process."""
        rate = self.run_.options.user_rate
        return even / rate if self.run_.options.arrivals == "even" else self.run_.random.expovariate(rate)

    def on_stop(self) -> None:
        """Leave nothing behind of a request that was never due."""
        if self.next:
            self.next.clip.drop()


class Request:
    """One that is ready to be sent, or could not be made."""

    def __init__(self, run: _Run) -> None:
        self.way = run.random.choice(run.options.ways.split(","))
        dialect, self.stream = WAYS[self.way]
        self.server = run.servers[dialect]
        form = run.random.choice(run.options.forms.split(","))
        if form == "base64" and dialect == "dashscope":
            form = "data"  # there nothing else would tell the format
        key = _draw(run.random, run.keys)
        self.clip = clip = run.make_clip()
        self.about = {"way": self.way, "sort": clip.sort, "codec": clip.codec, "form": form, "clip": clip.seed}
        self.about |= {"audio_s": round(clip.audio_s, 3), "tenant": list(run.keys).index(key)}
        self.call: Call | None = None
        self.failure = ""
        try:
            audio = clip.given(form, run, key)
        except (requests.RequestException, KeyError, ValueError) as error:
            self.failure = f"upload: {error!r}"
            return
        self.call = call(run.asked, dialect, audio, stream=self.stream, bare=clip.codec if form == "base64" else "")
        if key:
            self.call.headers["authorization"] = f"Bearer {key}"

    def answer(self, run: _Run) -> Answer:
        """Send it. The answer, if it is right. Raises `BadAnswerError`."""
        if not self.call:
            raise BadAnswerError(FAILED, self.failure)
        answer = self.server.send(self.call, stream=self.stream)
        answer.check(run.asked, self.clip.audio_s)
        caption = _digest(answer.text)
        run.unreported.append((caption, self.clip.seed, answer.id))
        run.seen.check(caption, self.clip.seed, answer.id)
        if answer.e2e_s > PROBED_FROM_S and run.random.random() < run.options.probe_share:
            again = [self.server.send(self.call, stream=self.stream) for _ in range(2)]
            if all(one.text == answer.text and one.e2e_s < answer.e2e_s / 2 for one in again):
                raise BadAnswerError("cached", "a clip that was sent again got the same words, much faster, twice")
        return answer


def _ask(run: _Run, request: Request, due: float) -> None:
    """Send a request and note what came of it. Times count from when it was due."""
    way, sent = request.way, time.time()
    late_s = sent - due
    about = request.about | {"due": round(due, 4), "late_s": round(late_s, 4), "warm_up": due < run.measured_from}
    try:
        answer = request.answer(run)
    except BadAnswerError as bad:
        run.note(**about, outcome=bad.kind, detail=bad.detail[:300], ended=round(time.time(), 4))
        _fire(run, "E2E", way, time.time() - due, bad)
        return
    finally:
        request.clip.drop()
    times = {name: value for name in ("itl_s", "stall_s") if (value := getattr(answer, name)) is not None}
    times["e2e_s"] = late_s + answer.e2e_s
    if answer.ttft_s is not None:
        times["ttft_s"] = late_s + answer.ttft_s
    run.note(
        **about,
        outcome="right",
        sent=round(sent, 4),
        ended=round(time.time(), 4),
        text=_digest(answer.text),
        tokens=answer.output_tokens,
        **{name: round(value, 4) for name, value in times.items()},
    )
    if not about["warm_up"]:
        _fire(run, "audio", way, request.clip.audio_s)
        for entry, name in (("E2E", "e2e_s"), ("TTFT", "ttft_s"), ("ITL", "itl_s")):
            if name in times:
                _fire(run, entry, way, times[name])


def _digest(text: str) -> str:
    return blake2b(text.encode(), digest_size=8).hexdigest()


def weights(text: str) -> dict[str, float]:
    """What `name=weight,name` says; a weight that is missing is 1."""
    parts = [part.rpartition("=") if "=" in part else (part, "", "1") for part in text.split(",")]
    return {name: float(weight) for name, _, weight in parts}


def _draw(source: random.Random, of: dict[str, float]) -> str:
    return source.choices(list(of), list(of.values()))[0]


def _fire(run: _Run, entry: str, name: str, seconds: float, error: BadAnswerError | None = None) -> None:
    run.events.request.fire(
        request_type=entry,
        name=name,
        response_time=seconds * 1000,
        response_length=0,
        exception=error and BadAnswerError(error.kind, ""),  # one entry for each kind
        context={},
    )


_run: _Run | None = None


@cache
def _bank(directory: str, codecs: str) -> Bank:
    """The sounds that this process makes its clips of."""
    bank = Bank(Path(directory))
    for codec in codecs.split(","):
        bank.clip(codec, 1, 0)
    return bank


@events.init.add_listener  # type: ignore[untyped-decorator]
def _prepare(environment: Any, **_: Any) -> None:
    """Make them before time runs."""
    _bank(environment.parsed_options.clips_dir, environment.parsed_options.codecs)


def _running() -> _Run:
    if _run is None:
        raise RuntimeError("no test runs")
    return _run


@events.test_start.add_listener  # type: ignore[untyped-decorator]
def _begin(environment: Any, **_: Any) -> None:
    global _run  # noqa: PLW0603 - Locust makes the users, and hands them nothing but the environment
    environment.stop_timeout = TIMEOUT_S
    _run = _Run(environment)


@events.test_stop.add_listener  # type: ignore[untyped-decorator]
def _wait_for_the_last(environment: Any, **_: Any) -> None:
    """In an open loop answers still come when no user is left; a worker tells of them before it ends."""
    if _run is not None:
        _run.under_way.join(TIMEOUT_S)
    environment.stop_timeout = 0.0  # which a worker would sleep


@events.report_to_master.add_listener  # type: ignore[untyped-decorator]
def _report(data: dict[str, Any], **_: Any) -> None:
    """Tell what was captioned, so that the master notices what no worker can: repeats among them."""
    if _run is not None:
        data["captioned"], _run.unreported = _run.unreported, []


@events.worker_report.add_listener  # type: ignore[untyped-decorator]
def _compare(data: dict[str, Any], **_: Any) -> None:
    run = _running()
    for caption, clip, id_ in data.get("captioned", ()):
        try:
            run.seen.check(caption, clip, id_)
        except BadAnswerError as bad:
            now = round(time.time(), 4)
            about = {"way": "all workers", "clip": clip, "audio_s": 0.0, "due": now, "ended": now, "warm_up": True}
            run.note(**about, outcome=bad.kind, detail=bad.detail)
            _fire(run, "E2E", "all workers", 0.0, bad)


@events.quitting.add_listener  # type: ignore[untyped-decorator]
def _end(environment: Any, **_: Any) -> None:
    kinds = [str(entry.error) for entry in environment.stats.errors.values()]
    if any(kind in error for error in kinds for kind in (*WRONG, FAILED)):
        environment.process_exit_code = 3
    else:
        environment.process_exit_code = (
            0 if environment.stats.total.num_requests > environment.stats.total.num_failures else 4
        )
