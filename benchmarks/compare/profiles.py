"""Where the time goes: py-spy on every part of a system while it works.

    python benchmarks/profiles.py [--systems NAME …] [--out FILE.md]

For each part, what it took of a CPU per request, split by what it did: the share of samples (threads that wait are not
sampled) times the part's CPU time. A sample counts for the first rule of `DOING` that fits one of its frames, looked at
from the innermost out.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from clips import alike, make
from compare import CLIPS, KINDS, ROOT, WARM_UP
from processes import ENGINE
from systems import Setup

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from clips import Clip
    from systems import Round, System

DOING = {
    "decode": r"soundfile|audio/decode\.py|media/audio|load_audio|torchcodec|/av/",
    "resample": r"resampl|soxr",
    "log-mel": r"features\.py|feature_extraction|audio_utils",
    "base64": r"base64",
    "tokenise, chat template, placeholders": r"multimodal/proc|processing_qwen|tokeniz|chat_utils|jinja|renderers/",
    "request parsing": r"json/|pydantic|msgspec|validat|dialects/messages|upload_form|request_body",
    "hand-over to and from the engine": r"serial_utils|core_client|zmq|serving/scheduling|engine/remote",
    "engine outputs, detokenise": r"detokenizer|output_processor|async_llm|serving/engine/|incremental",
    "answers (SSE)": r"chat_completion|serving/api|model_dump|sse",
    "HTTP": r"uvicorn|h11|httptools|starlette|fastapi|aiohttp",
    "Ray": r"/ray/",
    "metrics, logs": r"prometheus|metrics|logging|stats|loggers",
    "audio tower": r"audio_tower|Qwen3OmniMoeAudio|qwen3_omni_moe_thinker|embed_multimodal|_execute_mm_encoder",
    "sampler": r"v1/sample|sampler|topk_topp",
    "attention": r"attention|rotary",
    "experts": r"fused_moe|experts",
    "language model, other": r"model_executor|torch/nn|qwen3_moe",
    "step preparation": r"model_runner|input_batch|block_table|v1/worker",
    "scheduler": r"v1/core",
    "event loop": r"asyncio|uvloop|selectors|threading",
}


def main() -> None:
    """Profile, and print the tables."""
    kinds = {kind.name: kind for kind in KINDS}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", nargs="+", choices=kinds, default=["captioner", "vllm serve"])
    parser.add_argument("--model", type=Path, default=ROOT / "serving/embedded/checkpoint")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--max-num-seqs", type=int, default=64)
    parser.add_argument("--seconds", type=int, default=12, help="how long to look")
    options = parser.parse_args()
    clips, warm_up = alike(CLIPS / "30s", options.requests, 30), alike(CLIPS / "warm-up", WARM_UP, 20)
    make([*clips, *warm_up])
    for name in options.systems:
        with kinds[name](Setup(options.model, options.max_tokens, options.max_num_seqs)) as system:
            system.measure(warm_up, WARM_UP)
            one, samples = observe(system, clips, options.concurrency, options.seconds)
        print(f"\n### {name}: {one.requests / one.wall_s:.2f} requests/s while observed\n")
        for part, of_part in samples.items():
            print(table(part, one.use.cpu_s.get(part, 0) * 1000 / one.requests, of_part), flush=True)


def observe(
    system: System, clips: Sequence[Clip], concurrency: int, seconds: int
) -> tuple[Round, dict[str, Counter[str]]]:
    """Run every clip once; return the figures and, of each part, how often what it did was seen."""
    rounds: list[Round] = []
    work = threading.Thread(target=lambda: rounds.append(system.measure(clips, concurrency)))
    work.start()
    threading.Event().wait(1)  # until the first clips are in
    with tempfile.TemporaryDirectory() as directory:
        watched = [
            (part, Path(directory, str(process.pid)))
            for process in system.family.members()
            if (part := system.family.part(process)) not in ("other", "Ray", "proxy")
        ]
        spies = [
            subprocess.Popen(
                (
                    *(str(Path(sys.executable).with_name("py-spy")), "record", f"--pid={file.name}"),
                    *(
                        f"--output={file}",
                        f"--duration={seconds}",
                        "--rate=50",
                        "--format=raw",
                        "--full-filenames",
                        "--nonblocking",
                    ),
                ),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            for _, file in watched
        ]
        for spy in spies:
            spy.wait()
        found: dict[str, Counter[str]] = {}
        for part, file in watched:
            if file.exists():
                found.setdefault(part, Counter()).update(seen(file.read_text().splitlines()))
    work.join()
    return rounds[0], found


def seen(lines: Iterable[str]) -> Counter[str]:
    """Samples by what was done. A line is `frame;frame;… count`, outermost first."""
    counts: Counter[str] = Counter()
    for line in lines:
        stack, _, count = line.rpartition(" ")
        frames = stack.split(";")[::-1]
        hits = (doing for frame in frames for doing, pattern in DOING.items() if re.search(pattern, frame))
        counts[next(hits, "other")] += int(count)
    return counts


def table(part: str, cpu_ms: float, counts: Counter[str]) -> str:
    """CPU ms per request by what was done, as Markdown."""
    total = sum(counts.values()) or 1
    title = f"{part}{' (the engine)' if part in ENGINE else ''}: {cpu_ms:.0f} ms of CPU per request, {total} samples"
    rows = [f"| {doing} | {cpu_ms * n / total:.1f} | {n / total:.0%} |" for doing, n in counts.most_common(9)]
    return "\n".join((f"{title}\n", "| doing | ms per request | share |", "| --- | --- | --- |", *rows, ""))


if __name__ == "__main__":
    main()
