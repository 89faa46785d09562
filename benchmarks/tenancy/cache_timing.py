"""Can one tenant tell by the time whether another has sent the same audio? Measured at a running service.

Tenant A sends new clips. Then B sends these, and as many that nobody has sent, in random order. If anything of A's were
kept for others, B's first token would come sooner for the clips that A has sent. The answer is the difference of the
medians, and how often a difference as large comes about by chance (permutation test).

    captioner serve --no-auth …
    python benchmarks/cache_timing.py --url http://127.0.0.1:8000 --clips 40 --seconds 20
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import random
import statistics
import sys
import time
import urllib.request
import wave
from array import array

MODEL = "qwen3-omni-30b-a3b-captioner"
_PERMUTATIONS = 5000


def noise(seconds: float, seed: int) -> str:
    """Make a clip that no other resembles, as a data URL."""
    chance = random.Random(seed)
    samples = array("h", (chance.randint(-8000, 8000) for _ in range(round(16_000 * seconds))))
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes(samples.tobytes())
    return "data:audio/wav;base64," + base64.b64encode(buffer.getvalue()).decode()


def first_token_s(url: str, key: str, audio: str) -> float:
    """Ask for one token; return how long it took."""
    part = {"type": "input_audio", "input_audio": {"data": audio}}
    body = {"model": MODEL, "messages": [{"role": "user", "content": [part]}], "max_tokens": 1}
    request = urllib.request.Request(  # noqa: S310 - the caller's own service
        f"{url}/v1/chat/completions",
        json.dumps(body).encode(),
        {"content-type": "application/json", "authorization": f"Bearer {key}"},
    )
    began = time.perf_counter()
    with urllib.request.urlopen(request, timeout=300) as answer:  # noqa: S310
        answer.read()
    return time.perf_counter() - began


def verdict(sent_before: list[float], new: list[float], seed: int = 1) -> dict[str, float]:
    """How much sooner the clips were answered that had been sent before, and how likely that is by chance."""
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
    """Measure, and print the result; the exit status tells whether there is an advantage."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--url", default="http://127.0.0.1:8000")
    arguments.add_argument("--keys", nargs=2, default=("sk-tenant-a", "sk-tenant-b"))
    arguments.add_argument("--clips", type=int, default=40)
    arguments.add_argument("--seconds", type=float, default=20)
    given = arguments.parse_args()
    seed = time.time_ns()
    theirs, new = ([noise(given.seconds, seed + 2 * i + side) for i in range(given.clips)] for side in (0, 1))
    for audio in theirs:
        first_token_s(given.url, given.keys[0], audio)
    turns = [(audio, known) for known, clips in ((True, theirs), (False, new)) for audio in clips]
    random.Random(seed).shuffle(turns)
    took_s: dict[bool, list[float]] = {True: [], False: []}
    for audio, known in turns:
        took_s[known].append(first_token_s(given.url, given.keys[1], audio))
    told = verdict(took_s[True], took_s[False])
    print(json.dumps(told, indent=1))
    sys.exit(1 if told["by_chance"] < 0.01 else 0)


if __name__ == "__main__":
    main()
