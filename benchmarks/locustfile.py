"""Load by Locust: captions asked for in both dialects, whole and streamed; every answer is checked (wire.py).

    locust --headless -f benchmarks/locustfile.py --host http://127.0.0.1:8000 --arrivals poisson --load 4 …

`locust -f benchmarks/locustfile.py --help` lists the options under "captions"; README.md has examples. Locust tells
each figure as an entry of its own: `E2E`, `TTFT` and `ITL` (mean time between the tokens of one answer) in ms, and
`audio`, where "ms" is the audio of a right answer: its sum over time is audio-seconds per second. `--journal` gets a
line of JSON for each request, which is what a report is made of.

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
from wire import COMPATIBLE, FAILED, WRONG, Asked, BadAnswerError, Call, Seen, call, read

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
    add("--compatible-path", default=COMPATIBLE)
    add("--mix", default="30=1", help=f"lengths=weight,…: a sort of {','.join(LENGTHS_S)}, or seconds")
    add("--codecs", default="mp3", help=f"of {','.join(CODECS)}")
    add("--forms", default="data", help=f"of {','.join(FORMS)}")
    add("--clips-dir", default=".cache/benchmark-clips", help="for what clips are made of, and clips behind URLs")
    add("--clips-url", default="http://127.0.0.1:9999", help="where the server reaches --clips-dir")
    add("--run-seed", type=int, default=0, help="runs of different seeds have different clips")
    add("--arrivals", choices=("closed", "even", "poisson"), default="closed")
    add("--user-rate", type=float, default=0.1, help="requests per second of each user of an open loop")
    add("--curve", choices=CURVES, default="constant", help="how the load changes over time")
    add("--load", type=float, default=4, help="callers of a closed loop, or requests per second of an open one")
    add("--levels", default="1,2,4,8", help="loads of --curve steps")
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
        self.asked = Asked(options.model, options.tokens or None, options.usage_rule, options.compatible_path)
        self.bank = _bank(options.clips_dir, options.codecs)
        self.seen = Seen()
        self.bad = self.right = 0
        self.under_way = Pool()
        self.measured_from = time.time() + options.warm_up
        url = urlsplit(environment.host)
        self.prefix = url.path.rstrip("/")
        self.client = HTTPClient.from_url(
            environment.host, concurrency=100_000, connection_timeout=30, network_timeout=TIMEOUT_S
        )
        self.journal = Path(options.journal or os.devnull).open("a", buffering=1)  # noqa: SIM115 - until the process ends
        # Each worker has clips of its own.
        worker = max(0, getattr(environment.runner, "worker_index", 0))
        self.random = random.Random(f"{options.run_seed}.{worker}")
        self._seed = (options.run_seed * 1000 + worker) * 1_000_000
        self.keys = weights(os.environ.get("BENCHMARK_KEYS", ""))

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

    def _upload(self, run: _Run, key: str) -> bytes:
        """The way of DashScope's SDKs: ask for a policy, post the file."""
        began = time.perf_counter()
        asked = {"action": "getPolicy", "model": run.options.model}
        url = f"{run.client.host}:{run.client.port}{run.prefix}/api/v1/uploads"
        scheme = "https" if run.client.ssl else "http"
        told = requests.get(f"{scheme}://{url}", asked, headers={"authorization": f"Bearer {key}"}, timeout=60)
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
        """Begin anywhere in the time between two requests, so that all together ask evenly."""
        self.run_ = _running()
        if self.run_.options.arrivals != "closed":
            gevent.sleep(self.run_.random.random() / self.run_.options.user_rate)

    def wait_time(self) -> float:
        """Time from one request to the next."""
        options = self.run_.options
        if options.arrivals == "closed":
            return 0.0
        even = options.arrivals == "even"
        return 1 / options.user_rate if even else self.run_.random.expovariate(options.user_rate)

    @task  # type: ignore[untyped-decorator]
    def ask(self) -> None:
        """Ask for one caption, and in an open loop do not wait for it."""
        if self.run_.options.arrivals == "closed":
            self._ask(time.time())
        else:
            self.run_.under_way.spawn(self._ask, time.time())

    def _ask(self, due: float) -> None:
        run = self.run_
        way = run.random.choice(run.options.ways.split(","))
        dialect, stream = WAYS[way]
        form = run.random.choice(run.options.forms.split(","))
        key = _draw(run.random, run.keys)
        clip = run.make_clip()
        about = {"way": way, "sort": clip.sort, "codec": clip.codec, "form": form, "audio_s": round(clip.audio_s, 3)}
        about |= {"tenant": list(run.keys).index(key), "due": round(due, 4), "warm_up": due < run.measured_from}
        try:
            audio = clip.given(form, run, key)
            request = call(run.asked, dialect, audio, stream=stream, bare=clip.codec if form == "base64" else "")
            if key:
                request.headers["authorization"] = f"Bearer {key}"
            sent = time.time()
            answer = self._judged(request, clip, way)
        except (BadAnswerError, requests.RequestException, KeyError) as error:
            bad = error if isinstance(error, BadAnswerError) else BadAnswerError(FAILED, f"upload: {error!r}")
            run.bad += bad.kind in (*WRONG, FAILED)
            run.note(**about, outcome=bad.kind, detail=bad.detail[:300], ended=round(time.time(), 4))
            _fire(run, "E2E", way, time.time() - due, bad)
        else:
            run.right += 1
            run.note(
                **about,
                outcome="right",
                sent=round(sent, 4),
                ended=round(time.time(), 4),
                text=blake2b(answer.text.encode(), digest_size=8).hexdigest(),
                tokens=answer.output_tokens,
                **{name: round(value, 4) for name in TIMES if (value := getattr(answer, name)) is not None},
            )
            if not about["warm_up"]:
                _fire(run, "E2E", way, answer.e2e_s)
                _fire(run, "audio", way, clip.audio_s)
                if answer.ttft_s is not None:
                    _fire(run, "TTFT", way, answer.ttft_s)
                if answer.itl_s is not None:
                    _fire(run, "ITL", way, answer.itl_s)
        finally:
            if clip.served:
                clip.served.unlink(missing_ok=True)

    def _judged(self, request: Call, clip: Clip, way: str) -> Answer:
        """The answer, if it is right. Raises `BadAnswerError`."""
        run, stream = self.run_, WAYS[way][1]
        answer = send(run.client, run.prefix, request, stream=stream)
        answer.check(run.asked, clip.audio_s)
        run.seen.check(answer.text, clip.seed)
        if run.random.random() < run.options.probe_share:
            again = [send(run.client, run.prefix, request, stream=stream) for _ in range(2)]
            if all(one.text == answer.text and one.e2e_s < answer.e2e_s / 2 for one in again):
                raise BadAnswerError("cached", "a clip that was sent again got the same words, much faster, twice")
        return answer


TIMES = ("ttft_s", "itl_s", "stall_s", "e2e_s")


def send(client: HTTPClient, prefix: str, request: Call, *, stream: bool) -> Answer:
    """Send a request and read its answer. Raises `BadAnswerError`."""
    began = time.perf_counter()
    try:
        response = client.request("POST", prefix + request.path, request.body, request.headers)
        pieces = []
        while stream and (event := response.readline(b"\n\n")):
            pieces.append((time.perf_counter() - began, bytes(event)))
        if rest := response.read():
            pieces.append((time.perf_counter() - began, bytes(rest)))
    except (OSError, ValueError) as error:  # the client's own errors among them
        raise BadAnswerError(FAILED, f"connection: {error!r}") from error
    headers = {name.lower(): str(value) for name, value in response.items()}
    return read(response.status_code, headers, pieces, time.perf_counter() - began, stream=stream)


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


@events.quitting.add_listener  # type: ignore[untyped-decorator]
def _end(environment: Any, **_: Any) -> None:
    if _run is not None:
        _run.under_way.join(TIMEOUT_S)
    kinds = [str(entry.error) for entry in environment.stats.errors.values()]
    if any(kind in error for error in kinds for kind in (*WRONG, FAILED)):
        environment.process_exit_code = 3
    else:
        environment.process_exit_code = (
            0 if environment.stats.total.num_requests > environment.stats.total.num_failures else 4
        )
