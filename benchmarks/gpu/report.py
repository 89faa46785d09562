"""The report of a first hour: one JSON with everything, and one page of Markdown with what a reader looks for first."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benchmarks.gpu.journal import OK

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

UNKNOWN = (
    "kernels: whether they run, and agree with `vllm serve` (parity)",
    "Model Runner V2 on a device, its CUDA graphs and its sampler (runners)",
    "captions under FP8 (fp8)",
    "peak memory; the profiles' working memory is an estimate (memory)",
    "NCCL, custom all-reduce and shared memory between GPUs (tensor_parallel)",
    "whether a stop frees the GPU's memory and the port (drain)",
    "time to load, compile and capture (start)",
    "every speed, and so every cost (throughput)",
)
"""Facts that need a GPU, and the step that finds each."""


def markdown(report: Mapping[str, Any]) -> str:
    """Return the report as Markdown."""
    lines = [
        "# First hour",
        "",
        f"Model `{report['model']}`, {report['gpus']} GPUs, load format {report['load_format']}.",
    ]
    if not report["gpus"]:
        lines += ["", "**No GPU was used: nothing here says anything about a GPU.**"]
    if report["load_format"] == "dummy":
        lines += ["", "**The weights are random: captions have no sense, and FP8 says nothing about quality.**"]
    lines += ["", "| Step | Result | Seconds | |", "|---|---|---|---|"]
    for name, record in report["steps"].items():
        reason = _brief(record.get("reason", ""))
        lines.append(f"| {name} | {record['status']} | {record.get('seconds', '')} | {reason} |")
    for name, record in report["steps"].items():
        if "result" in record:
            lines += ["", f"## {name}", "", *_section(name, record["result"])]
    missing = [text for text in UNKNOWN if report["steps"].get(_step(text), {}).get("status") != OK]
    if missing or not report["gpus"]:
        lines += ["", "## Still unknown", ""]
        lines += [f"- {text}" for text in (missing if report["gpus"] else UNKNOWN)]
    return "\n".join(lines) + "\n"


def _step(text: str) -> str:
    return text.rpartition("(")[2].rstrip(")")


def _section(name: str, result: Mapping[str, Any]) -> Iterator[str]:
    if name == "doctor":
        for each in result["report"]["findings"]:
            yield f"- {each['level']}: {each['probe']}: {each['message']}"
        return
    if "agreement" in result:
        yield from _agreement(result)
        yield ""
        yield from _table({name: of.get("load", of) for name, of in result["systems"].items()})
        return
    if all(isinstance(of, dict) for of in result.values()):
        yield from _table(result)
        return
    for key, value in result.items():
        yield f"- {key.replace('_', ' ')}: {value}"


def _agreement(result: Mapping[str, Any]) -> Iterator[str]:
    yield f"Greedy captions against `{result['reference']}`: words before the first difference, of all."
    yield ""
    clips = sorted({clip for of in result["agreement"].values() for clip in of}, key=_seconds)
    if not clips:
        yield "No two systems gave captions."
        return
    yield f"| | {' | '.join(clips)} |"
    yield "|---" * (len(clips) + 1) + "|"
    for system, of in result["agreement"].items():
        cells = [_cell(of[clip]) if clip in of else "-" for clip in clips]
        yield f"| {system} | {' | '.join(cells)} |"
    for system, found in result["systems"].items():
        if "failed_clips" in found:
            yield ""
            yield f"`{system}` has no caption of some clips: {_brief(found['failed_clips'])}"
        if "failed" in found:
            yield ""
            yield f"`{system}` failed: {_brief(found['failed'])}"
        elif "repeats_itself" in found:
            yield ""
            yield f"`{system}` gives the same caption twice: {found['repeats_itself']}"


def _seconds(clip: str) -> float:
    return float(clip.removesuffix(" s"))


def _cell(of: Mapping[str, Any]) -> str:
    return "equal" if of["equal"] else f"{of['shared_words']} of {max(of['words'])}"


def _table(found: Mapping[str, Any]) -> Iterator[str]:
    rows = {name: of for name, of in found.items() if isinstance(of, dict)}
    columns = list(dict.fromkeys(key for of in rows.values() for key in of if key not in _LONG))
    if not columns:
        return
    yield f"| | {' | '.join(column.replace('_', ' ') for column in columns)} |"
    yield "|---" * (len(columns) + 1) + "|"
    for name, of in rows.items():
        cells = [_brief(of.get(column, "")) for column in columns]
        yield f"| {name} | {' | '.join(cells)} |"


def _brief(value: Any) -> str:
    """Return a table's cell: one line, of a long text the begin and the end."""
    text = " ".join(str(value).split()).replace("|", "\\|")
    return text if len(text) <= _CELL else f"{text[: _CELL // 3]} … {text[-2 * _CELL // 3 :]}"


_CELL = 240
_LONG = ("captions", "traceback", "repeats_itself", "input_tokens")
