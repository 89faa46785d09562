"""What the benchmarks tell is what was measured: no wrong answer counts, ratios are taken round by round."""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from cache_timing import verdict
from clips import CODECS, Bank, Clip, make_clip, mixed
from processes import Family, Snapshot
from profiles import seen
from report import figures, interval, ratios, to_markdown
from wire import Asked, BadAnswerError, Seen, read

from serving.audio.decode import decode

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


def events(text: str = "a dog", finish_reason: str = "length", tokens: int = 3) -> bytes:
    """Make the body of an answer."""
    said: list[dict[str, Any]] = [
        {"choices": [{"delta": {"role": "assistant"}, "finish_reason": None}]},
        {"choices": [{"delta": {"content": text}, "finish_reason": None}]},
        {"choices": [{"delta": {}, "finish_reason": finish_reason}]},
        {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": tokens, "total_tokens": 9 + tokens}},
    ]
    return (
        b"".join(b"data: %s\n\n" % json.dumps(event).encode() for event in ({"id": "one"} | of for of in said))
        + b"data: [DONE]\n\n"
    )


def test_ttft_is_when_the_first_text_has_arrived() -> None:
    """The role alone is no token, and half an event is none either."""
    body = events()
    first_text_ends = body.index(b"\n\n", body.index(b"a dog")) + 2
    cuts = (0, 20, first_text_ends - 1, first_text_ends, len(body))
    pieces = [(float(number), body[a:b]) for number, (a, b) in enumerate(itertools.pairwise(cuts))]
    answer = read(200, {}, pieces, 9.0, stream=True)
    answer.check(Asked("m", 3, "any"), 0)
    assert (answer.ttft_s, answer.e2e_s, answer.output_tokens) == (2.0, 9.0, 3)


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (503, events()),
        (200, events(text="")),
        (200, events(finish_reason="stop")),
        (200, events(tokens=2)),
        (200, events().removesuffix(b"data: [DONE]\n\n")),
        (200, b'data: {"error": {"message": "x"}}\n\n' + events()),
    ],
)
def test_a_wrong_answer_is_no_figure(status: int, body: bytes) -> None:
    """Another status, no text, another end, other tokens, a cut stream, an error within it."""
    with pytest.raises(BadAnswerError):
        read(status, {}, [(1.0, body)], 1.0, stream=True).check(Asked("m", 3, "any"), 0)


def a_round(wall_s: float, frontend_s: float) -> dict[str, Any]:
    """Make a round of ten requests."""
    return {
        "requests": 10,
        "audio_s": 300.0,
        "wall_s": wall_s,
        "cpu_s": {"frontend": frontend_s, "audio workers": 0.5, "engine core": 2.0},
        "machine_cpu_s": 9.0,
        "load_generator_cpu_s": 0.1,
        "memory_mib": {"frontend": 700, "engine core": 2000},
        "ttft_s": [0.1] * 9 + [1.0],
        "e2e_s": [2.0] * 10,
    }


def test_cpu_of_the_engine_is_told_apart() -> None:
    """Everything but the engine's processes is what serving costs, per request."""
    of = figures(a_round(5.0, 0.5))
    assert of["requests/s"] == pytest.approx(2.0)
    assert of["CPU ms per request, all but the engine"] == pytest.approx(100.0)
    assert of["CPU ms per request, engine"] == pytest.approx(200.0)
    assert of["TTFT p50, s"] == pytest.approx(0.1)


def test_ratios_are_of_the_same_round() -> None:
    """A slow moment of the machine that both had cancels out."""
    above, below = [a_round(5.0, 0.5), a_round(10.0, 0.5)], [a_round(10.0, 1.5), a_round(20.0, 1.5)]
    of = ratios(above, below)
    assert of["requests/s"] == pytest.approx([2.0, 2.0])
    assert of["CPU ms per request, all but the engine"] == pytest.approx([0.5, 0.5])
    run = {
        "title": "T",
        "conditions": {"commands": {"captioner": "captioner serve"}},
        "workloads": [{"name": "W", "rounds": {"captioner": above, "vllm serve": below}}],
    }
    assert "| requests/s | 2.00 (2.00 to 2.00) [2.00 to 2.00] |" in to_markdown([run])


def test_an_interval_of_ratios_covers_what_is_behind_them() -> None:
    """Of a hundred runs of twelve noisy rounds around 1.5, nearly all intervals hold it."""
    chance = random.Random(3)
    found = [interval([1.5 * math.exp(chance.gauss(0, 0.2)) for _ in range(12)]) for _ in range(100)]
    assert sum(low <= 1.5 <= high for low, high in found) >= 85
    assert all(high / low < 1.5 for low, high in found)


def test_mixed_clips_are_the_same_mix_every_round(tmp_path: Path) -> None:
    """All kinds of file, 1 s to 10 min, no file twice, and lossless ones only where they fit into a request."""
    clips = mixed(tmp_path, 24, 3)
    assert len({clip.path for clip in clips}) == 72
    for first in range(0, 72, 24):
        batch = clips[first : first + 24]
        assert {clip.path.suffix.removeprefix(".") for clip in batch} == set(CODECS)
        assert min(clip.duration_s for clip in batch) < 1.2
        assert 400 < max(clip.duration_s for clip in batch) <= 600
    assert max(clip.duration_s for clip in clips if clip.path.suffix in (".wav", ".flac")) <= 30


@pytest.mark.parametrize("kind", CODECS)
def test_clips_have_the_length_that_is_told(kind: str, tmp_path: Path) -> None:
    """Every kind of file is one that the service reads, within an encoder's padding."""
    clip = Clip(tmp_path / f"clip.{kind}", 1.5)
    make_clip(clip, 7)
    assert len(decode(clip.path, max_duration_s=60)) / 16_000 == pytest.approx(1.5, abs=0.15)


def test_spliced_clips_are_all_distinct(tmp_path: Path) -> None:
    """Also the shortest ones, of which a run has thousands."""
    bank = Bank(tmp_path)
    assert len({bank.clip("mp3", 1.0, seed)[0] for seed in range(500)}) == 500


def told_as_repeats(captions: Iterable[str], same_pairs: float) -> bool:
    """Whether these, each of a clip of its own, are not let pass."""
    seen = Seen(same_pairs)
    try:
        for number, caption in enumerate(captions):
            seen.check(caption, number, str(number))
    except BadAnswerError as error:
        return error.kind == "repeated"
    return False


def test_captions_that_are_alike_by_chance_are_told_from_repeats() -> None:
    """None may be, but of a small model some, however long the run is. All the same, or ten in turn, are no chance."""
    chance = random.Random(5)
    alike = [str(chance.randrange(100)) for _ in range(2000)]
    assert told_as_repeats(alike, 0)
    assert not told_as_repeats(alike, 0.05)
    assert told_as_repeats(["1"] * 10, 0.05)
    assert told_as_repeats([str(number % 10) for number in range(200)], 0.05)


def test_a_clip_that_is_sent_twice_is_told() -> None:
    """Whatever is said of it."""
    seen = Seen(0.05)
    seen.check("a dog", 7, "a")
    with pytest.raises(BadAnswerError, match="sent twice"):
        seen.check("a cat", 7, "b")


@pytest.fixture
def orphan() -> Iterator[tuple[str, int]]:
    """A busy process that was adopted away from the one that started it, with the mark it inherited."""
    mark = f"CAPTIONER_BENCHMARK_MEMBER=test-{os.getpid()}"
    busy = "subprocess.Popen((sys.executable, '-c', 'while True: pass'), stdout=subprocess.DEVNULL)"
    code = f"import subprocess, sys; print({busy}.pid, flush=True)"
    told = subprocess.run(
        (sys.executable, "-c", code),
        check=True,
        stdout=subprocess.PIPE,
        env=os.environ | dict([mark.split("=")]),
        stdin=subprocess.DEVNULL,
    )
    yield mark, (pid := int(told.stdout))
    psutil.Process(pid).kill()


def test_daemons_count_for_the_system_that_started_them(orphan: tuple[str, int]) -> None:
    """Ray's processes are nobody's children any more, and yet what they use is used."""
    mark, pid = orphan
    family = Family(psutil.Process(), mark)
    assert pid in {process.pid for process in family.members()}
    before = Snapshot.of(family)
    psutil.Process(pid).cpu_percent(0.5)
    assert before.until(Snapshot.of(family)).cpu_s["other"] > 0


def test_samples_count_for_what_the_innermost_known_frame_does() -> None:
    """A line of py-spy's is a stack and how often it was seen."""
    lines = [
        "main (serving/cli/main.py:1);post (uvicorn/protocols/http.py:3);read (/x/soundfile.py:9) 4",
        "main (serving/cli/main.py:1);strange (elsewhere.py:2) 1",
    ]
    assert seen(lines) == Counter({"decode": 4, "other": 1})


def test_an_advantage_by_cache_is_told_from_chance() -> None:
    """Clips that come sooner because somebody had sent them are found; the same times in another order are not."""
    chance = random.Random(1)
    slow = [1 + 0.1 * chance.random() for _ in range(40)]
    fast = [0.8 + 0.1 * chance.random() for _ in range(40)]
    assert verdict(fast, slow)["by_chance"] < 0.01
    assert verdict(slow[:20], slow[20:])["by_chance"] > 0.01
