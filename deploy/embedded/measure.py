"""Evaluation of the checkpoint through the HTTP API, and its model card.

`python -m deploy.embedded.measure CACHE` starts `captioner serve` with CACHE/checkpoint on a free port, requests
captions of the held-out clips, unchanged and in other codings, compares some with those of transformers, and writes
CACHE/README.md, the model card of the checkpoint (`serving/embedded/README.md`). `--base-url` uses a running service
that serves the checkpoint.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

from deploy.embedded import codecs
from deploy.embedded.evaluate import THROUGH_THE_API, captions_of, decoded, held_out, judged

if TYPE_CHECKING:
    from collections.abc import Iterator

START_TIMEOUT_S = 600
CURVE_ROWS = 20


@contextmanager
def served(checkpoint: Path, log: Path) -> Iterator[str]:
    """Run the service with `checkpoint`; yield the base URL of its API. Raises `RuntimeError` if it does not start."""
    command = [
        str(Path(sys.executable).with_name("captioner")),
        "serve",
        "--port=0",
        "--no-auth",
        f"--data-dir={log.absolute().parent / 'data'}",
        f"--model={checkpoint.absolute()}",
    ]
    with log.open("w") as out:
        service = subprocess.Popen(command, stdout=out, stderr=out)
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not (found := re.search(r"ready after .* on (http://[^\s\"]+)", log.read_text())):
            if service.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the service did not start:\n{log.read_text()}")
            time.sleep(1)
        yield f"{found[1]}/v1"
    finally:
        service.terminate()
        service.wait()


def curve(path: Path) -> str:
    """Return a table of about `CURVE_ROWS` rows of the learning curve."""
    with path.open(newline="") as lines:
        rows = [row for row in csv.reader(lines) if row[0].isdecimal()]
    chosen = rows[:: max(1, len(rows) // CURVE_ROWS)]
    chosen += [rows[-1]] if rows[-1] not in chosen else []
    table = ["| Step | loss of the captions | of the helper heads | of the beats |", "|---:|---:|---:|---:|"]
    table += [
        f"| {step} | {' | '.join(loss if float(loss) else 'not learnt' for loss in losses)} |"
        for step, *losses, _ in chosen
    ]
    return "\n".join(table) + "\n"


def main() -> None:
    """Serve, evaluate, compare, write the card."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", type=Path)
    parser.add_argument("--base-url", help="base URL of a service that serves the checkpoint, including /v1")
    parser.add_argument("--clips", type=int, default=1_200, help="held-out clips to evaluate")
    parser.add_argument("--coded-clips", type=int, default=100, help="clips to evaluate in each coding")
    parser.add_argument("--compared-clips", type=int, default=60, help="clips to decode also with transformers")
    arguments = parser.parse_args()
    cache = arguments.cache
    checkpoint = cache / "checkpoint"
    clips, entries = held_out(cache, arguments.clips)
    with (
        nullcontext(arguments.base_url) if arguments.base_url else served(checkpoint, cache / "service.log") as base_url
    ):
        print(f"{len(clips)} clips through {base_url}", flush=True)
        captions = captions_of(base_url, "", clips)
        (cache / "captions.jsonl").write_text("\n".join(json.dumps(caption) for caption in captions))
        table = judged(entries, captions, THROUGH_THE_API)
        print(table, flush=True)
        codings = codecs.table(cache, base_url, "", arguments.coded_clips)
    compared = decoded(checkpoint, clips[: arguments.compared_clips])
    equal = sum(ours == theirs for ours, theirs in zip(captions, compared, strict=False))
    config = json.loads((checkpoint / "config.json").read_text())["thinker_config"]
    card = Template((Path(__file__).parent / "card.md").read_text()).substitute(
        vocabulary=config["text_config"]["vocab_size"],
        size=f"{(checkpoint / 'model.safetensors').stat().st_size / 1e6:.1f} MB",
        table=table,
        codings=codings,
        equal=equal,
        compared=len(compared),
        curve=curve(cache / "training.csv"),
    )
    (cache / "README.md").write_text(card)
    print(f"{equal} of {len(compared)} captions equal those of transformers; wrote {cache / 'README.md'}")


if __name__ == "__main__":
    main()
