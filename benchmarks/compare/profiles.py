"""CPU time per request by activity: py-spy on every part of a system under load.

    python -m benchmarks.compare.profiles [--systems NAME …]

Prints a Markdown table for each part of each system: the share of samples by activity (idle threads are not sampled)
times the part's CPU time. A sample counts for the first rule of `ACTIVITIES` that matches one of its stack frames, from
the innermost frame outwards.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
import threading
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.compare.comparison import KINDS, WARM_UP, warm_up_clips
from benchmarks.compare.systems import Setup
from benchmarks.load.clips import alike, make
from benchmarks.processes import ENGINE
from benchmarks.program import BIN, CHECKPOINT, CLIPS, option_parser

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from benchmarks.compare.systems import Round, System
    from benchmarks.load.clips import Clip

ACTIVITIES = {
    "decode": r"soundfile|audio/decode\.py|media/audio|load_audio|torchcodec|/av/",
    "resample": r"resampl|soxr",
    "log-mel": r"features\.py|feature_extraction|audio_utils",
    "base64": r"base64",
    "tokenise, chat template, placeholders": r"multimodal/proc|processing_qwen|tokeniz|chat_utils|jinja|renderers/",
    "request parsing": r"json/|pydantic|msgspec|validat|dialects/messages|upload_form|request_body",
    "transfer to and from the engine": r"serial_utils|core_client|zmq|serving/scheduling|engine/remote",
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
"""Activity by a pattern in the path or function of a stack frame."""


def main() -> None:
    """Profile, and print the tables."""
    kinds = {kind.name: kind for kind in KINDS}
    parser = option_parser(__doc__)
    parser.add_argument("--systems", nargs="+", choices=kinds, default=["captioner", "vllm serve"])
    parser.add_argument("--model", type=Path, default=CHECKPOINT)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--max-num-seqs", type=int, default=64)
    parser.add_argument("--seconds", type=int, default=12, help="duration of the profile")
    options = parser.parse_args()
    clips, warm_up = alike(CLIPS / "30s", options.requests, 30), warm_up_clips()
    make(clips)
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
    """Run every clip once; return the figures, and the samples of each part by activity."""
    rounds: list[Round] = []
    work = threading.Thread(target=lambda: rounds.append(system.measure(clips, concurrency)))
    work.start()
    threading.Event().wait(1)  # until the first clips are in progress
    with tempfile.TemporaryDirectory() as directory:
        profiled = [
            (part, Path(directory, str(process.pid)))
            for process in system.family.members()
            if (part := system.family.part(process)) not in ("other", "Ray", "proxy")
        ]
        spies = [
            subprocess.Popen(
                (
                    *(str(BIN / "py-spy"), "record", f"--pid={file.name}", f"--output={file}"),
                    *(f"--duration={seconds}", "--rate=50", "--format=raw", "--full-filenames", "--nonblocking"),
                ),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            for _, file in profiled
        ]
        for spy in spies:
            spy.wait()
        found: dict[str, Counter[str]] = {}
        for part, file in profiled:
            if file.exists():
                found.setdefault(part, Counter()).update(by_activity(file.read_text().splitlines()))
    work.join()
    return rounds[0], found


def by_activity(lines: Iterable[str]) -> Counter[str]:
    """Count samples by activity. A line is `frame;frame;… count`, outermost first."""
    counts: Counter[str] = Counter()
    for line in lines:
        stack, _, count = line.rpartition(" ")
        frames = stack.split(";")[::-1]
        hits = (name for frame in frames for name, pattern in ACTIVITIES.items() if re.search(pattern, frame))
        counts[next(hits, "other")] += int(count)
    return counts


def table(part: str, cpu_ms: float, counts: Counter[str]) -> str:
    """Return the CPU ms per request by activity, as Markdown."""
    total = sum(counts.values()) or 1
    title = f"{part}{' (the engine)' if part in ENGINE else ''}: {cpu_ms:.0f} ms of CPU per request, {total} samples"
    rows = [f"| {name} | {cpu_ms * n / total:.1f} | {n / total:.0%} |" for name, n in counts.most_common(9)]
    return "\n".join((f"{title}\n", "| activity | ms per request | share |", "| --- | --- | --- |", *rows, ""))


if __name__ == "__main__":
    main()
