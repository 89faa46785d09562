"""Timing test of a running service's caches: no tenant may be able to measure that another sent the same audio.

    captioner serve --no-auth …
    python -m benchmarks.tenancy.cache_timing --url http://127.0.0.1:8000 --clips 40 --seconds 20

Tenant A sends new clips. Then B sends these, and as many that nobody has sent, in random order. If the service kept
anything of A's for others, B's first token would arrive sooner for the clips that A has sent. Prints the difference of
the medians, and the probability of such a difference by chance (permutation test); the exit status is 1 below 0.01.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import time
import urllib.request
from array import array

from benchmarks.load.wav import wav_data_url
from benchmarks.load.wire import chat_body
from benchmarks.program import option_parser

_PERMUTATIONS = 5000


def noise(seconds: float, seed: int) -> str:
    """Return a clip that resembles no other, as a data URL."""
    chance = random.Random(seed)
    samples = array("h", (chance.randint(-8000, 8000) for _ in range(round(16_000 * seconds))))
    return wav_data_url(samples.tobytes())


def first_token_s(url: str, key: str, audio: str) -> float:
    """Request one token; return the seconds until the answer."""
    request = urllib.request.Request(  # noqa: S310 - the user's own service
        f"{url}/v1/chat/completions",
        json.dumps(chat_body(audio, max_tokens=1)).encode(),
        {"content-type": "application/json", "authorization": f"Bearer {key}"},
    )
    began = time.perf_counter()
    with urllib.request.urlopen(request, timeout=300) as answer:  # noqa: S310
        answer.read()
    return time.perf_counter() - began


def verdict(sent_before: list[float], new: list[float], seed: int = 1) -> dict[str, float]:
    """Return the advantage of clips that had been sent before, and its probability by chance."""
    chance = random.Random(seed)
    gain = statistics.median(new) - statistics.median(sent_before)
    together, count = sent_before + new, len(sent_before)
    as_large = 0
    for _ in range(_PERMUTATIONS):
        chance.shuffle(together)
        as_large += statistics.median(together[count:]) - statistics.median(together[:count]) >= gain
    return {
        "sent_before_ms": round(1000 * statistics.median(sent_before), 2),
        "new_ms": round(1000 * statistics.median(new), 2),
        "gain": round(gain / statistics.median(new), 4),
        "by_chance": as_large / _PERMUTATIONS,
    }


def main() -> None:
    """Measure, and print the result; the exit status is 1 if there is an advantage."""
    parser = option_parser(__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--keys", nargs=2, default=("sk-tenant-a", "sk-tenant-b"))
    parser.add_argument("--clips", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=20)
    options = parser.parse_args()
    seed = time.time_ns()
    of_a, new = ([noise(options.seconds, seed + 2 * i + side) for i in range(options.clips)] for side in (0, 1))
    for audio in of_a:
        first_token_s(options.url, options.keys[0], audio)
    turns = [(audio, known) for known, clips in ((True, of_a), (False, new)) for audio in clips]
    random.Random(seed).shuffle(turns)
    took_s: dict[bool, list[float]] = {True: [], False: []}
    for audio, known in turns:
        took_s[known].append(first_token_s(options.url, options.keys[1], audio))
    found = verdict(took_s[True], took_s[False])
    print(json.dumps(found, indent=1))
    sys.exit(1 if found["by_chance"] < 0.01 else 0)


if __name__ == "__main__":
    main()
