"""Comparison of the captions of a clip in several codings, through the HTTP API.

`python -m deploy.embedded.codecs CACHE --base-url URL --key KEY` sends held-out clips as 16 kHz WAV and in each other
coding, and prints for how many clips all facts are the same. Needs the programs ffmpeg and sox.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from deploy.embedded.corpus.captions import Facts, parse
from deploy.embedded.evaluate import captions_of, held_out, same_duration, same_rate

if TYPE_CHECKING:
    from collections.abc import Callable

CODINGS = {
    "WAV 44.1 kHz stereo": ("wav", "ffmpeg -v error -y -i {} -ar 44100 -af pan=stereo|c0=c0|c1=c0 {}"),
    "MP3 128 kbit/s": ("mp3", "ffmpeg -v error -y -i {} -ar 44100 -c:a libmp3lame -b:a 128k {}"),
    "Opus 32 kbit/s": ("opus", "ffmpeg -v error -y -i {} -c:a libopus -b:a 32k {}"),
    "AMR narrow-band 12.2 kbit/s": ("amr", "sox {} -r 8000 -c 1 -C 7 -t amr-nb {}"),
    "GSM WAV": ("wav", "ffmpeg -v error -y -i {} -ar 8000 -ac 1 -c:a libgsm_ms {}"),
}
"""Name of a coding: file name extension, and the command that encodes a clip."""


def differences(first: Facts | None, second: Facts | None) -> list[str]:
    """Return the names of the facts that differ; rates and durations within the evaluation's tolerance are equal."""
    if not first or not second:
        return ["grammar"] if first != second else []
    differ = [name for name, part in _ALIKE.items() if part(first) != part(second)]
    rates = [[event.rate for event in facts.events] for facts in (first, second)]
    if len(rates[0]) != len(rates[1]) or not all(map(same_rate, *rates)):
        differ.append("rates")
    if not same_duration(first.duration_s, second.duration_s):
        differ.append("duration")
    return differ


_ALIKE: dict[str, Callable[[Facts], object]] = {
    "kinds": lambda facts: [event.kind for event in facts.events],
    "languages": lambda facts: [event.language for event in facts.events],
    "manners": lambda facts: [event.manner for event in facts.events],
    "overlap": lambda facts: facts.overlap,
    "loudness": lambda facts: facts.loudness,
    "noise": lambda facts: facts.noise,
    "room": lambda facts: facts.reverberant,
    "clipping": lambda facts: facts.clipped,
}


def table(cache: Path, base_url: str, key: str, clips: int) -> str:
    """Return a table: for how many of `clips` synthetic held-out clips each coding kept all facts of the caption."""
    paths, entries = held_out(cache, 10**9)
    chosen = [path for path, entry in zip(paths, entries, strict=True) if not entry["real"]][:clips]
    plain = [parse(caption) for caption in captions_of(base_url, key, chosen)]
    rows = ["| Coding | same facts | of | what differed |", "|---|---:|---:|---|"]
    with tempfile.TemporaryDirectory() as scratch:
        for name, (extension, command) in CODINGS.items():
            coded = [Path(scratch) / f"{clip.stem}.{extension}" for clip in chosen]
            for clip, path in zip(chosen, coded, strict=True):
                subprocess.run(command.format(clip, path).split(), check=True)
            stated = [parse(caption) for caption in captions_of(base_url, key, coded)]
            found = [differences(first, second) for first, second in zip(plain, stated, strict=True)]
            lost = Counter(fact for facts in found for fact in facts)
            rest = ", ".join(f"{fact} {count}" for fact, count in lost.most_common())
            rows.append(f"| {name} | {found.count([])} | {len(chosen)} | {rest} |")
            print(rows[-1], flush=True)
    return "\n".join(rows) + "\n"


def main() -> None:
    """Encode clips, request captions, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", type=Path)
    parser.add_argument("--base-url", required=True, help="base URL of the HTTP API, including /v1")
    parser.add_argument("--key", default="", help="API key")
    parser.add_argument("--clips", type=int, default=100, help="synthetic held-out clips (default: %(default)s)")
    arguments = parser.parse_args()
    print(table(arguments.cache, arguments.base_url, arguments.key, arguments.clips))


if __name__ == "__main__":
    main()
