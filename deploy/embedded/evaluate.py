"""Scores of the embedded captioner on held-out clips, through the HTTP API or, for a quick check, with transformers.

`python -m deploy.embedded.evaluate CACHE --base-url http://127.0.0.1:8000/v1 --key KEY --report REPORT` sends each clip
at temperature 0, parses the captions back to facts and writes the tables. `--checkpoint DIR` decodes with transformers
instead; the report then says so.
"""

# ruff: noqa: FBT001, S310  # scores count booleans; the operator chooses the URL

from __future__ import annotations

import argparse
import base64
import json
import random
import urllib.request
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from deploy.embedded.batches import read_facts
from deploy.embedded.corpus.captions import INSTRUMENTS, LANGUAGES, SPEAKERS, Event, Facts, caption, parse

if TYPE_CHECKING:
    from collections.abc import Iterable

PEOPLE = {*SPEAKERS, "person"}
SYNTHETIC, REAL_SPEECH, REAL_EFFECT = "synthetic", "recorded speech", "recorded effect"

AIMS = {
    "kind per event, synthetic": 97,
    "kind per event, recorded effect": 50,
    "all kinds of a two-sound clip, synthetic": 88,
    "order, where the kinds are right": 95,
    "gender, synthetic": 90,
    "language, synthetic": 80,
    "language, recorded speech": 80,
    "instrument family (unseen sound font)": 80,
    "rate or tempo within 20 %": 85,
    "duration within 1 s (clips to 8 s)": 98,
    "duration within 10 % (clips of 8 to 30 s)": 90,
    "loudness": 97,
    "noise level": 97,
    "everything right (synthetic clips)": 75,
}
"""Aims in %."""

MOST_TOKENS = 160
"""Twice the longest caption; the captions of a barely trained checkpoint may have no end."""

THROUGH_THE_API = "through the served HTTP API, at temperature 0"


class Scores:
    """Counts of right answers and of all answers by attribute, and confusions."""

    def __init__(self) -> None:
        self.counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        self.confusions: Counter[tuple[str, str]] = Counter()
        self.kinds: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        self.languages: Counter[tuple[str, str]] = Counter()

    def add(self, attribute: str, right: bool) -> None:
        """Count one answer."""
        self.counts[attribute][0] += right
        self.counts[attribute][1] += 1

    def add_clip(self, truth: Facts, stated: Facts | None, sources: list[str]) -> None:
        """Count the facts that a caption `stated` of a clip with the facts `truth`, whose events are from `sources`."""
        self.add("caption follows the grammar", stated is not None)
        stated = stated or Facts((), 0.0, loudness="", noise="")
        synthetic = all(source == SYNTHETIC for source in sources)
        true_kinds, stated_kinds = [_kind(event) for event in truth.events], [_kind(event) for event in stated.events]
        matches = _matched(truth, stated)
        self._add_kinds(truth, stated, true_kinds, stated_kinds, synthetic)
        for event, match, source in zip(truth.events, matches, sources, strict=True):
            self._add_event(event, match, source, stated)
        long = truth.duration_s > 8
        within = "duration within 10 % (clips of 8 to 30 s)" if long else "duration within 1 s (clips to 8 s)"
        self.add(within, same_duration(truth.duration_s, stated.duration_s))
        self.add("loudness", truth.loudness == stated.loudness)
        self.add("noise level", truth.noise == stated.noise)
        self.add("room", truth.reverberant == stated.reverberant)
        self.add("clipping", truth.clipped == stated.clipped)
        if synthetic:
            self.add(
                "everything right (synthetic clips)", stated == parse(caption(truth)) or _same(truth, stated, matches)
            )

    def _add_kinds(
        self, truth: Facts, stated: Facts, true_kinds: list[str], stated_kinds: list[str], synthetic: bool
    ) -> None:
        shape = (
            "overlap" if truth.overlap else {1: "one sound", 2: "two in order", 3: "three in order"}[len(true_kinds)]
        )
        material = "synthetic" if synthetic else "with recordings"
        right = Counter(true_kinds) == Counter(stated_kinds)
        self.add(f"all kinds of the clip: {shape}, {material}", right)
        if len(true_kinds) == 2 and synthetic:
            self.add("all kinds of a two-sound clip, synthetic", right)
        if len(true_kinds) > 1 and not truth.overlap and right:
            self.add("order, where the kinds are right", true_kinds == stated_kinds and not stated.overlap)

    def _add_event(self, event: Event, match: Event | None, source: str, stated: Facts) -> None:
        kind = _kind(event)
        right = match is not None
        self.add(f"kind per event, {source}", right)
        if source != REAL_SPEECH:
            label = f"{kind} ({'recorded' if source == REAL_EFFECT else 'synthetic'})"
            self.kinds[label][0] += right
            self.kinds[label][1] += 1
        if not right:
            self.confusions[kind, " + ".join(_kind(other) for other in stated.events) or "(nothing)"] += 1
        if event.kind in INSTRUMENTS:
            self.add("instrument family (unseen sound font)", right)
        if event.kind in PEOPLE:
            speech = next((other for other in stated.events if other.kind in PEOPLE), Event(""))
            if event.kind in {"man", "woman"}:
                self.add(f"gender, {source}", event.kind == speech.kind)
            elif event.kind == "child":
                self.add(f"child as a child, {source}", event.kind == speech.kind)
            self.add(f"language, {source}", event.language == speech.language)
            if source == SYNTHETIC:
                self.add("manner of speaking", event.manner == speech.manner)
            self.languages[event.language, speech.language] += 1
            if event.language != speech.language:
                self.confusions[event.language, speech.language or "(no speech)"] += 1
        if event.rate:
            self.add("rate or tempo within 20 %", match is not None and same_rate(event.rate, match.rate))


def _kind(event: Event) -> str:
    return "speech" if event.kind in PEOPLE else event.kind


def _matched(truth: Facts, stated: Facts) -> list[Event | None]:
    """Return for each true event a stated event of the same kind, each at most once."""
    left, found = list(stated.events), []
    for event in truth.events:
        match = next((other for other in left if _kind(other) == _kind(event)), None)
        if match:
            left.remove(match)
        found.append(match)
    return found


def _same(truth: Facts, stated: Facts, matches: list[Event | None]) -> bool:
    """Return whether `stated` agrees with `truth` in all facts, durations and rates within their tolerance."""
    plain = [(event.kind, event.language, event.manner) for event in truth.events]
    if plain != [(event.kind, event.language, event.manner) for event in stated.events]:
        return False
    rates = all(
        match is not None and same_rate(event.rate, match.rate)
        for event, match in zip(truth.events, matches, strict=True)
    )
    levels = [
        (facts.overlap, facts.loudness, facts.noise, facts.reverberant, facts.clipped) for facts in (truth, stated)
    ]
    return rates and same_duration(truth.duration_s, stated.duration_s) and levels[0] == levels[1]


def same_rate(truth: float, stated: float) -> bool:
    """Return whether a rate is within 20 % of the true one; 0 means no rate."""
    return abs(stated / truth - 1) <= 0.201 if truth else not stated


def same_duration(truth_s: float, stated_s: float) -> bool:
    """Return whether a duration is within a second of the true one, or within 10 % above 8 s."""
    return abs(truth_s - stated_s) <= (1 if truth_s <= 8 else 0.1 * truth_s)


def source_of(origin: str) -> str:
    """Return the kind of material of an origin."""
    if origin.startswith("prompts "):
        return REAL_SPEECH
    return REAL_EFFECT if "/" in origin else SYNTHETIC


def caption_of(base_url: str, key: str, model: str, clip: Path) -> str:
    """Return the caption of one clip from the HTTP API."""
    audio = base64.b64encode(clip.read_bytes()).decode()
    part = {"type": "input_audio", "input_audio": {"data": f"data:audio/{clip.suffix[1:]};base64,{audio}"}}
    body = {
        "model": model,
        "temperature": 0,
        "max_tokens": MOST_TOKENS,
        "messages": [{"role": "user", "content": [part]}],
    }
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    request = urllib.request.Request(f"{base_url}/chat/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=300) as response:
        return str(json.load(response)["choices"][0]["message"]["content"])


def served_model(base_url: str, key: str) -> str:
    """Return the first model that the API lists."""
    request = urllib.request.Request(f"{base_url}/models", headers={"Authorization": f"Bearer {key}"})
    with urllib.request.urlopen(request, timeout=60) as response:
        return str(json.load(response)["data"][0]["id"])


def decoded(checkpoint: Path, clips: Iterable[Path]) -> list[str]:
    """Return greedy captions from transformers, without a server."""
    import soundfile  # noqa: PLC0415
    import torch  # noqa: PLC0415
    from transformers import Qwen3OmniMoeForConditionalGeneration, Qwen3OmniMoeProcessor  # noqa: PLC0415

    processor = Qwen3OmniMoeProcessor.from_pretrained(checkpoint)
    model = Qwen3OmniMoeForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval().thinker
    prompt = "<|im_start|>user\n<|audio_start|><|audio_pad|><|audio_end|><|im_end|>\n<|im_start|>assistant\n"
    end = processor.tokenizer.eos_token_id
    captions = []
    for clip in clips:
        samples, _ = soundfile.read(clip, dtype="float32")
        inputs = processor(text=prompt, audio=[samples], sampling_rate=16_000, return_tensors="pt")
        with torch.inference_mode():
            ids = model.generate(**inputs, max_new_tokens=MOST_TOKENS, do_sample=False, eos_token_id=end)
        captions.append(processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    return captions


def scored(entries: list[dict[str, object]], captions: list[str]) -> Scores:
    """Return the scores of `captions` against the facts in `entries`."""
    scores = Scores()
    for entry, text in zip(entries, captions, strict=True):
        sources = [source_of(origin) for origin in entry["origins"]]  # type: ignore[attr-defined]
        scores.add_clip(read_facts(entry), parse(text), sources)
    return scores


def report(scores: Scores, shuffled: Scores, how: str, clips: int) -> str:
    """Return the tables in Markdown."""
    rows = [f"Measured on {clips} held-out clips {how}.", ""]
    rows += ["| Attribute | right | of | % | aim | % with the clips shuffled |", "|---|---:|---:|---:|---:|---:|"]
    for name, (right, total) in sorted(scores.counts.items()):
        by_chance = shuffled.counts.get(name, [0, 0])
        chance = f"{100 * by_chance[0] / by_chance[1]:.1f}" if by_chance[1] else "-"
        share = 100 * right / total
        aim = f"{AIMS[name]} {'met' if share >= AIMS[name] else '**missed**'}" if name in AIMS else ""
        rows.append(f"| {name} | {right} | {total} | {share:.1f} | {aim} | {chance} |")
    rows += ["", "Kinds of sound, right of all:", ""]
    rows.append(", ".join(f"{kind} {right}/{total}" for kind, (right, total) in sorted(scores.kinds.items())) + ".")
    rows += ["", "Languages, synthesised and recorded (rows: what was spoken, columns: what the caption said):", ""]
    rows += [f"| | {' | '.join(LANGUAGES)} | no speech |", "|---|" + "---:|" * (len(LANGUAGES) + 1)]
    rows += [
        f"| {spoken} | {' | '.join(str(scores.languages[spoken, said]) for said in (*LANGUAGES, ''))} |"
        for spoken in LANGUAGES
    ]
    rows += ["", "Most frequent confusions (what it was → what the caption said):", ""]
    rows += [f"- {truth} → {said}: {count}" for (truth, said), count in scores.confusions.most_common(30)]
    return "\n".join(rows) + "\n"


def held_out(cache: Path, clips: int) -> tuple[list[Path], list[dict[str, object]]]:
    """Return the paths of the first `clips` held-out files, and their entries."""
    folder = cache / "held-out"
    entries = [json.loads(line) for line in (folder / "facts.jsonl").read_text().splitlines()][:clips]
    return [folder / entry["file"] for entry in entries], entries


def captions_of(base_url: str, key: str, clips: Iterable[Path], concurrency: int = 8) -> list[str]:
    """Return the captions of `clips` from the HTTP API."""
    model = served_model(base_url, key)
    with ThreadPoolExecutor(concurrency) as pool:
        captions = []
        for text in pool.map(lambda clip: caption_of(base_url, key, model, clip), clips):
            captions.append(text)
            if len(captions) % 200 == 0:
                print(f"{len(captions)} captions", flush=True)
        return captions


def judged(entries: list[dict[str, object]], captions: list[str], how: str) -> str:
    """Return the tables for `captions`, and for comparison for the same captions assigned to other clips."""
    permuted = captions.copy()
    random.Random(0).shuffle(permuted)
    return report(scored(entries, captions), scored(entries, permuted), how, len(entries))


def main() -> None:
    """Request captions, score them, write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", type=Path)
    parser.add_argument("--base-url", help="base URL of the HTTP API, including /v1")
    parser.add_argument("--key", default="", help="API key")
    parser.add_argument("--checkpoint", type=Path, help="checkpoint to decode with transformers instead of a server")
    parser.add_argument("--clips", type=int, default=1_200)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--report", type=Path)
    arguments = parser.parse_args()
    clips, entries = held_out(arguments.cache, arguments.clips)
    if arguments.base_url:
        captions, how = captions_of(arguments.base_url, arguments.key, clips, arguments.concurrency), THROUGH_THE_API
    else:
        captions = decoded(arguments.checkpoint, clips)
        how = "by greedy decoding with transformers, not through the served HTTP API"
    text = judged(entries, captions, how)
    print(text)
    if arguments.report:
        arguments.report.write_text(text)
    (arguments.cache / "captions.jsonl").write_text("\n".join(json.dumps(caption) for caption in captions))


if __name__ == "__main__":
    main()
