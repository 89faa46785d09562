"""Shared state of a Locust process: options, clips, endpoints, journal; and the requests that are made of them."""

from __future__ import annotations

import base64
import itertools
import json
import os
import random
import time
from dataclasses import dataclass, field
from functools import cache
from hashlib import blake2b
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import gevent
import requests
from gevent.pool import Pool
from geventhttpclient import HTTPClient

from benchmarks.load.checks import FAILED, BadAnswerError, Expected, SeenCaptions, check
from benchmarks.load.clips import LENGTHS_S, Bank
from benchmarks.load.wire import prepare, read

if TYPE_CHECKING:
    import argparse

    from benchmarks.load.wire import Answer, Dialect, PreparedRequest

WAYS: dict[str, tuple[Dialect, bool]] = {
    "openai-stream": ("openai", True),
    "openai": ("openai", False),
    "dashscope-stream": ("dashscope", True),
    "dashscope": ("dashscope", False),
}
"""Dialect, and whether streamed."""
FORMS = ("data", "base64", "url", "upload")
CONNECTIONS = ("keep-alive", "close", "both")
PROBED_FROM_S = 0.2
"""Shorter times say nothing about a cache: a pause of the machine takes as long."""
IN_THREAD_S = 60
"""Clips from this length on are spliced in a thread: that takes up to half a second, in which others must be sent."""


class Run:
    """State that the users of one process share."""

    def __init__(self, environment: Any) -> None:
        options: argparse.Namespace = environment.parsed_options
        self.events = environment.events
        self.options = options
        self.expected = Expected(
            options.model, options.tokens or None, options.usage_rule, options.least_s, options.caption_words or None
        )
        self.bank = bank(options.clips_dir, options.codecs)
        self.seen = SeenCaptions(options.same_pairs, resent=bool(options.clips_per_length))
        self.in_flight = Pool()
        self.measured_from = time.time() + options.warm_up
        host = environment.host.rstrip("/")
        bases: dict[Dialect, str] = {"openai": options.openai_base_url, "dashscope": options.dashscope_base_url}
        self.endpoints = {
            dialect: Endpoint(base if base.startswith("http") else host + base, options.timeout_s)
            for dialect, base in bases.items()
        }
        self._journal = Path(options.journal or os.devnull).open("a", buffering=1)  # noqa: SIM115 - until the process ends
        self.worker = max(0, getattr(environment.runner, "worker_index", 0))
        # Each worker has its own clips.
        self.random = random.Random(f"{options.run_seed}.{self.worker}")
        self._seed = (options.run_seed * 1000 + self.worker) * 1_000_000
        self._resent: dict[int, Clip] = {}
        self.keys = weights(os.environ.get("BENCHMARK_KEYS", ""))
        self.unreported: list[tuple[str, int, str]] = []
        self.numbers = itertools.count()

    def clip(self) -> Clip:
        """Return a new clip, or with `--clips-per-length` one of a fixed set."""
        lengths, codecs = weights(self.options.mix), self.options.codecs.split(",")
        sort, codec = _draw(self.random, lengths), self.random.choice(codecs)
        if not self.options.clips_per_length:
            self._seed += 1
            return self._make_clip(sort, codec, self._seed, self.random)
        number = self.random.randrange(self.options.clips_per_length)
        # The same clips in every worker, so that the master can compare their captions.
        seed = (list(lengths).index(sort) * len(codecs) + codecs.index(codec)) * self.options.clips_per_length + number
        if seed not in self._resent:
            self._resent[seed] = self._make_clip(sort, codec, seed, random.Random(seed))
        return self._resent[seed]

    def note(self, **values: Any) -> None:
        """Add a line to the journal."""
        self._journal.write(json.dumps(values) + "\n")

    def _make_clip(self, sort: str, codec: str, seed: int, chance: random.Random) -> Clip:
        low, high = LENGTHS_S.get(sort) or (float(sort), float(sort))
        wanted = (codec, low * (high / low) ** chance.random(), seed)
        if wanted[1] < IN_THREAD_S:
            data, audio_s = self.bank.clip(*wanted)
        else:
            data, audio_s = gevent.get_hub().threadpool.apply(self.bank.clip, wanted)
        return Clip(seed, sort, codec, audio_s, data)


@dataclass(frozen=True, slots=True)
class Clip:
    """A clip of one request, or of several with `--clips-per-length`."""

    seed: int
    sort: str
    codec: str
    audio_s: float
    data: bytes = field(repr=False)


class Endpoint:
    """Base URL of one dialect."""

    def __init__(self, base: str, timeout_s: float) -> None:
        self.base = base.rstrip("/")
        self._path = urlsplit(self.base).path
        self._client = HTTPClient.from_url(
            self.base, concurrency=100_000, connection_timeout=30, network_timeout=timeout_s
        )

    def send(self, request: PreparedRequest, *, stream: bool) -> Answer:
        """Send a request and read its answer. Raises `BadAnswerError`."""
        began = time.perf_counter()
        pieces = []
        try:
            response = self._client.request("POST", self._path + request.path, request.body, request.headers)
            while stream and (event := response.readline(b"\n\n")):
                pieces.append((time.perf_counter() - began, bytes(event)))
            if rest := response.read():
                pieces.append((time.perf_counter() - began, bytes(rest)))
        except (OSError, ValueError, HTTPException) as error:  # the client's own errors are of HTTPException
            raise BadAnswerError(FAILED, f"connection: {error!r}", cause="connection") from error
        headers = {name.lower(): str(value) for name, value in response.items()}
        return read(response.status_code, headers, pieces, time.perf_counter() - began, stream=stream)


class Request:
    """A request that is ready to be sent, or could not be made (`failure`)."""

    def __init__(self, run: Run, connection: str) -> None:
        self.way = run.random.choice(run.options.ways.split(","))
        dialect, self.stream = WAYS[self.way]
        self.endpoint = run.endpoints[dialect]
        form = run.random.choice(run.options.forms.split(","))
        if form == "base64" and dialect == "dashscope":
            form = "data"  # that dialect names the format in a data URL alone
        key = _draw(run.random, run.keys)
        self.clip = clip = run.clip()
        self.about = {"way": self.way, "sort": clip.sort, "codec": clip.codec, "form": form, "clip": clip.seed}
        self.about |= {"audio_s": round(clip.audio_s, 3), "tenant": list(run.keys).index(key)}
        self._served: Path | None = None
        self.prepared: PreparedRequest | None = None
        self.failure = ""
        try:
            audio = self._audio(form, run, key)
        except (requests.RequestException, KeyError, ValueError) as error:
            self.failure = f"upload: {error!r}"
            return
        bare = clip.codec if form == "base64" else ""
        self.prepared = prepare(run.expected, dialect, audio, stream=self.stream, bare=bare)
        if key:
            self.prepared.headers["authorization"] = f"Bearer {key}"
        if connection == "close":
            self.prepared.headers["connection"] = "close"

    def answer(self, run: Run) -> Answer:
        """Send the request; return the answer if it is right. Raises `BadAnswerError`."""
        if not self.prepared:
            raise BadAnswerError(FAILED, self.failure)
        answer = self.endpoint.send(self.prepared, stream=self.stream)
        check(answer, run.expected, self.clip.audio_s)
        caption = digest(answer.text)
        run.unreported.append((caption, self.clip.seed, answer.id))
        run.seen.check(caption, self.clip.seed, answer.id)
        if answer.e2e_s > PROBED_FROM_S and run.random.random() < run.options.probe_share:
            again = [self.endpoint.send(self.prepared, stream=self.stream) for _ in range(2)]
            if all(one.text == answer.text and one.e2e_s < answer.e2e_s / 2 for one in again):
                raise BadAnswerError("cached", "a clip that was sent again got the same words, much faster, twice")
        return answer

    def drop(self) -> None:
        """Remove the clip from the directory from which it was served."""
        if self._served:
            self._served.unlink(missing_ok=True)

    def _audio(self, form: str, run: Run, key: str) -> bytes:
        """Return the audio as the request has it."""
        clip = self.clip
        if form == "url":
            name = f"served-{run.worker}-{next(run.numbers)}-{clip.seed}.{clip.codec}"
            self._served = Path(run.options.clips_dir, name)
            self._served.write_bytes(clip.data)
            return f"{run.options.clips_url}/{name}".encode()
        if form == "upload":
            return _upload(clip, run, key)
        prefix = f"data:audio/{clip.codec};base64," if form == "data" else ""
        return prefix.encode() + base64.b64encode(clip.data)


def _upload(clip: Clip, run: Run, key: str) -> bytes:
    """Upload a clip as DashScope's SDKs do: get a policy, post the file. Returns its `oss://` URL."""
    began = time.perf_counter()
    query = {"action": "getPolicy", "model": run.options.model}
    url = f"{run.endpoints['dashscope'].base}/uploads"
    answer = requests.get(url, query, headers={"authorization": f"Bearer {key}"}, timeout=60)
    policy = answer.json()["data"]
    name = f"{policy['upload_dir']}/{clip.seed}.{clip.codec}"
    fields = {
        "OSSAccessKeyId": policy["oss_access_key_id"],
        "Signature": policy["signature"],
        "policy": policy["policy"],
        "key": name,
        "x-oss-object-acl": policy["x_oss_object_acl"],
        "x-oss-forbid-overwrite": policy["x_oss_forbid_overwrite"],
        "success_action_status": "200",
    }
    requests.post(policy["upload_host"], fields, files={"file": clip.data}, timeout=300).raise_for_status()
    fire(run, "upload", clip.codec, time.perf_counter() - began)
    return f"oss://{name}".encode()


def fire(run: Run, entry: str, name: str, seconds: float, error: BadAnswerError | None = None) -> None:
    """Report a figure to Locust."""
    run.events.request.fire(
        request_type=entry,
        name=name,
        response_time=seconds * 1000,
        response_length=0,
        exception=error and BadAnswerError(error.kind, ""),  # one entry for each kind
        context={},
    )


def digest(text: str) -> str:
    """Return a short hash of a caption."""
    return blake2b(text.encode(), digest_size=8).hexdigest()


def weights(text: str) -> dict[str, float]:
    """Parse `name=weight,name`; a missing weight is 1."""
    parts = [part.rpartition("=") if "=" in part else (part, "", "1") for part in text.split(",")]
    return {name: float(weight) for name, _, weight in parts}


@cache
def bank(directory: str, codecs: str) -> Bank:
    """Return the sounds of which this process makes clips."""
    sounds = Bank(Path(directory))
    for codec in codecs.split(","):
        sounds.clip(codec, 1, 0)
    return sounds


def _draw(source: random.Random, of: dict[str, float]) -> str:
    return source.choices(list(of), list(of.values()))[0]
