"""Benchmarks report what was measured: no wrong answer counts, and ratios are taken round by round."""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import subprocess
import sys
from collections import Counter
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from benchmarks.compare.profiles import by_activity
from benchmarks.compare.systems import SERVICE_EXECUTOR
from benchmarks.load.checks import BadAnswerError, Expected, SeenCaptions, check
from benchmarks.load.clips import CODECS, Bank, Clip, make_clip, mixed
from benchmarks.load.wire import read
from benchmarks.processes import Family, Snapshot
from benchmarks.program import ROOT
from benchmarks.report.markdown import figures, interval, ratios, to_markdown
from benchmarks.tenancy.cache_timing import verdict
from serving.audio.decode import decode

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path


def events(text: str = "a dog", finish_reason: str = "length", tokens: int = 3) -> bytes:
    """Make the body of an answer."""
    parts: list[dict[str, Any]] = [
        {"choices": [{"delta": {"role": "assistant"}, "finish_reason": None}]},
        {"choices": [{"delta": {"content": text}, "finish_reason": None}]},
        {"choices": [{"delta": {}, "finish_reason": finish_reason}]},
        {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": tokens, "total_tokens": 9 + tokens}},
    ]
    return (
        b"".join(b"data: %s\n\n" % json.dumps(event).encode() for event in ({"id": "one"} | of for of in parts))
        + b"data: [DONE]\n\n"
    )


def test_ttft_is_when_the_first_text_has_arrived() -> None:
    """Neither the role alone nor half an event is a first token."""
    body = events()
    first_text_ends = body.index(b"\n\n", body.index(b"a dog")) + 2
    cuts = (0, 20, first_text_ends - 1, first_text_ends, len(body))
    pieces = [(float(number), body[a:b]) for number, (a, b) in enumerate(itertools.pairwise(cuts))]
    answer = read(200, {}, pieces, 9.0, stream=True)
    check(answer, Expected("m", 3, "any"), 0)
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
def test_a_wrong_answer_is_not_counted(status: int, body: bytes) -> None:
    """Another status, no text, another end, other tokens, a cut stream, or an error in the stream is wrong."""
    with pytest.raises(BadAnswerError):
        check(read(status, {}, [(1.0, body)], 1.0, stream=True), Expected("m", 3, "any"), 0)


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


def test_cpu_of_the_engine_is_reported_separately() -> None:
    """The cost of serving per request is the CPU of all processes but the engine's."""
    of = figures(a_round(5.0, 0.5))
    assert of["requests/s"] == pytest.approx(2.0)
    assert of["CPU ms per request, all but the engine"] == pytest.approx(100.0)
    assert of["CPU ms per request, engine"] == pytest.approx(200.0)
    assert of["TTFT p50, s"] == pytest.approx(0.1)


def test_ratios_are_of_the_same_round() -> None:
    """A slow moment of the machine that affects both systems cancels out."""
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


def test_an_interval_of_ratios_covers_their_true_value() -> None:
    """Nearly all intervals of a hundred runs, each of twelve noisy rounds around 1.5, contain 1.5."""
    chance = random.Random(3)
    found = [interval([1.5 * math.exp(chance.gauss(0, 0.2)) for _ in range(12)]) for _ in range(100)]
    assert sum(low <= 1.5 <= high for low, high in found) >= 85
    assert all(high / low < 1.5 for low, high in found)


def test_mixed_clips_are_the_same_mix_every_round(tmp_path: Path) -> None:
    """Every round has all kinds of file, 1 s to 10 min, no file twice, and lossless files only if they fit."""
    clips = mixed(tmp_path, 24, 3)
    assert len({clip.path for clip in clips}) == 72
    for first in range(0, 72, 24):
        batch = clips[first : first + 24]
        assert {clip.path.suffix.removeprefix(".") for clip in batch} == set(CODECS)
        assert min(clip.duration_s for clip in batch) < 1.2
        assert 400 < max(clip.duration_s for clip in batch) <= 600
    assert max(clip.duration_s for clip in clips if clip.path.suffix in (".wav", ".flac")) <= 30


@pytest.mark.parametrize("kind", CODECS)
def test_clips_have_their_nominal_length(kind: str, tmp_path: Path) -> None:
    """The service reads every kind of file, with its length within an encoder's padding."""
    clip = Clip(tmp_path / f"clip.{kind}", 1.5)
    make_clip(clip, 7)
    assert len(decode(clip.path, max_duration_s=60)) / 16_000 == pytest.approx(1.5, abs=0.15)


def test_spliced_clips_are_all_distinct(tmp_path: Path) -> None:
    """The shortest clips, of which a run has thousands, are distinct, too."""
    bank = Bank(tmp_path)
    assert len({bank.clip("mp3", 1.0, seed)[0] for seed in range(500)}) == 500


def are_repeats(captions: Iterable[str], same_pairs: float) -> bool:
    """Return whether these captions, each of another clip, are rejected."""
    seen = SeenCaptions(same_pairs)
    try:
        for number, caption in enumerate(captions):
            seen.check(caption, number, str(number))
    except BadAnswerError as error:
        return error.kind == "repeated"
    return False


def test_chance_is_distinguished_from_repeats() -> None:
    """Some captions of a small model may be equal, in a run of any length; all equal, or ten in turn, are repeats."""
    chance = random.Random(5)
    alike = [str(chance.randrange(100)) for _ in range(2000)]
    assert are_repeats(alike, 0)
    assert not are_repeats(alike, 0.05)
    assert are_repeats(["1"] * 10, 0.05)
    assert are_repeats([str(number % 10) for number in range(200)], 0.05)


def test_a_clip_that_is_sent_twice_is_rejected() -> None:
    """A second answer to a clip is rejected, for any caption."""
    seen = SeenCaptions(0.05)
    seen.check("a dog", 7, "a")
    with pytest.raises(BadAnswerError, match="sent twice"):
        seen.check("a cat", 7, "b")


def test_a_clip_that_is_sent_again_needs_the_same_caption() -> None:
    """With `resent`, a clip with another caption is rejected, and so are two clips with one caption."""
    seen = SeenCaptions(resent=True)
    seen.check("a dog", 7, "a")
    seen.check("a dog", 7, "b")
    with pytest.raises(BadAnswerError, match=r"^changed: "):
        seen.check("a cat", 7, "c")
    with pytest.raises(BadAnswerError, match=r"^repeated: "):
        seen.check("a dog", 8, "d")
    with pytest.raises(BadAnswerError, match=r"^id: "):
        seen.check("a dog", 7, "d")


def test_the_words_of_a_fake_engine_are_counted() -> None:
    """A caption of another number of words than expected is cut or doubled."""
    expected = Expected("m", None, "any", words=2)
    for text, tokens, right in (("a dog", 2, True), ("a dog a dog", 4, False), ("a", 1, False), ("a dog", 3, False)):
        answer = read(200, {}, [(1.0, events(text, "stop", tokens))], 1.0, stream=True)
        if right:
            check(answer, expected, 0)
        else:
            with pytest.raises(BadAnswerError, match=r"^cut: "):
                check(answer, expected, 0)


def test_the_offline_engine_runs_the_executor_of_the_service() -> None:
    """The class whose name the comparison passes to vLLM exists."""
    module, _, name = SERVICE_EXECUTOR.rpartition(".")
    assert f"class {name}(" in (ROOT / f"{module.replace('.', '/')}.py").read_text()


@pytest.fixture
def orphan() -> Iterator[tuple[str, int]]:
    """A busy process that was detached from its parent, with the mark that it inherited."""
    mark = f"CAPTIONER_BENCHMARK_MEMBER=test-{os.getpid()}"
    busy = "subprocess.Popen((sys.executable, '-c', 'while True: pass'), stdout=subprocess.DEVNULL)"
    code = f"import subprocess, sys; print({busy}.pid, flush=True)"
    started = subprocess.run(
        (sys.executable, "-c", code),
        check=True,
        stdout=subprocess.PIPE,
        env=os.environ | dict([mark.split("=")]),
        stdin=subprocess.DEVNULL,
    )
    yield mark, (pid := int(started.stdout))
    psutil.Process(pid).kill()


def test_daemons_count_for_the_system_that_started_them(orphan: tuple[str, int]) -> None:
    """Daemons such as Ray's, which are no descendants any more, are members by their mark."""
    mark, pid = orphan
    family = Family(psutil.Process(), mark)
    assert pid in {process.pid for process in family.members()}
    before = Snapshot.of(family)
    psutil.Process(pid).cpu_percent(0.5)
    assert before.until(Snapshot.of(family)).cpu_s["other"] > 0


def test_samples_count_for_the_innermost_known_frame() -> None:
    """A line of py-spy is a stack and its number of samples."""
    lines = [
        "main (serving/cli/main.py:1);post (uvicorn/protocols/http.py:3);read (/x/soundfile.py:9) 4",
        "main (serving/cli/main.py:1);strange (elsewhere.py:2) 1",
    ]
    assert by_activity(lines) == Counter({"decode": 4, "other": 1})


def test_an_advantage_by_a_cache_is_distinguished_from_chance() -> None:
    """Faster answers to clips that were sent before are found; the same times in another order are not."""
    chance = random.Random(1)
    slow = [1 + 0.1 * chance.random() for _ in range(40)]
    fast = [0.8 + 0.1 * chance.random() for _ in range(40)]
    assert verdict(fast, slow)["by_chance"] < 0.01
    assert verdict(slow[:20], slow[20:])["by_chance"] > 0.01
