"""`captioner caption FILE|DIR|URL …`: captions on standard output, progress and errors on standard error."""

from __future__ import annotations

import argparse
import contextlib
import os
import queue
import sys
import threading
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serving.cli.caption import discovery, embedded, output
from serving.cli.caption.client import Caption, Service, ServiceError
from serving.cli.caption.progress import Progress
from serving.cli.caption.sources import Source, SourceError, expand
from serving.cli.parser import Parser
from serving.cli.terminal import fail, note

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

DONE, SOME_FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130
"""Exit statuses."""

_POLL_S = 0.1
_MOST_JOBS = 64

_EPILOG = f"""\
Without --url a captioner of this user that runs on {discovery.HOST}:{discovery.PORT}
is used. If there is none, the embedded stand-in (a small model that is often
wrong, not the 30B captioner) is started for this command, which takes about
half a minute and 2.9 GB of memory, and stopped again.

Exit status: {DONE} all clips have a caption; {SOME_FAILED} some have none;
{USAGE} wrong options; {INTERRUPTED} interrupted."""


def parser() -> Parser:
    """Return the parser of the command's options."""
    made = Parser(
        "captioner caption",
        description="Describe audio in English: files, directories, URLs.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument(
        "clips",
        nargs="+",
        metavar="FILE|DIR|URL",
        help="audio or video files; directories (audio and video below them); http(s) URLs, which the service "
        "downloads; patterns in quotes; - for standard input",
    )
    made.add_argument("--url", help="address of the service; CAPTIONER_URL")
    made.add_argument("--key", help="its API key; better: CAPTIONER_KEY, which other users of this machine do not see")
    made.add_argument("--embedded", action="store_true", help="start the embedded stand-in, whatever runs")
    made.add_argument(
        "--format", choices=output.formats(), default="text", help="json: one object a line. Default: %(default)s"
    )
    if "srt" in output.formats():
        made.add_argument(
            "--timeline", action="store_true", help="captions with times, of pieces of the clip; srt and vtt have them"
        )
    made.add_argument("-o", "--output", type=Path, metavar="DIR", help="write a file for each clip into this directory")
    made.add_argument("--jobs", type=_jobs, default=4, metavar="N", help="clips at the same time. Default: %(default)s")
    made.set_defaults(timeline=False)
    return made


def main(argv: Sequence[str]) -> int:
    """Run `caption …`; return the exit status."""
    options = parser()
    given = options.parse_args(list(argv[1:]))
    given.timeline = given.timeline or given.format in output.SUBTITLES
    contradiction = given.embedded and given.url
    given.url = given.url or (None if given.embedded else os.environ.get("CAPTIONER_URL") or None)
    given.key = given.key or os.environ.get("CAPTIONER_KEY") or None
    if contradiction:
        return fail("--embedded and --url contradict each other; leave one out", USAGE)
    sources = list(expand(given.clips))
    try:
        _check(given, sources)
        with contextlib.ExitStack() as stack:
            progress = Progress(sys.stderr)
            stack.callback(progress.erase)
            # Nothing is started for clips that cannot be read.
            usable = any(not source.problem for source in sources)
            service = _service(given, progress, stack) if usable else Service(f"http://{discovery.HOST}")
            progress.restart()
            return Run(given, sources, service, progress).run()
    except ValueError as error:
        return fail(str(error), USAGE)
    except (ServiceError, embedded.StartError) as error:
        return fail(_with_remedy(error), SOME_FAILED)
    except KeyboardInterrupt:
        return fail("interrupted", INTERRUPTED)


def _check(given: argparse.Namespace, sources: list[Source]) -> None:
    """Raise `ValueError` for options that contradict each other."""
    if sum(source.name == "stdin" and source.path is None for source in sources) > 1:
        raise ValueError("standard input (-) can be one clip alone")
    if given.output is None:
        if given.format in output.SUBTITLES and len(sources) > 1:
            raise ValueError(f"--format {given.format} of several clips needs --output DIR: each has a file of its own")
        return
    targets: dict[Path, Source] = {}
    for source in (each for each in sources if not each.problem):
        target = output.destination(source, given.output, given.format)
        if (other := targets.setdefault(target, source)) is not source:
            raise ValueError(f"{other.name} and {source.name} would both be written to {target}; caption them apart")


def _service(given: argparse.Namespace, progress: Progress, stack: contextlib.ExitStack) -> Service:
    """Return a service that is ready, and has the key. Raises `ServiceError`, `StartError`, `ValueError`."""
    if given.url:
        service = Service(given.url, given.key)
    elif not given.embedded and (found := discovery.running()):
        note(f"using the service on {found.origin}")
        service = Service(found.origin, given.key)
    elif not embedded.installed():
        where = "" if given.embedded else f"no service runs on {discovery.HOST}:{discovery.PORT}, and "
        raise ValueError(f"{where}vLLM is not installed here; pass --url, or install captioner with its extra `cpu`")
    else:
        where = "" if given.embedded else f"no service runs on {discovery.HOST}:{discovery.PORT}; "
        note(f"{where}starting the embedded stand-in, a small model that is often wrong (--url: another service)")
        progress.restart()
        own = stack.enter_context(embedded.EmbeddedService(lambda doing: progress.show(f"starting: {doing}")))
        service = Service(own.url, own.key)
    discovery.wait_until_ready(service, progress.show)
    service.choose_model()
    progress.erase()
    return service


def _with_remedy(error: Exception) -> str:
    if isinstance(error, ServiceError) and error.status == 401:  # noqa: PLR2004 - a status
        return f"the service refuses the key: {error} Pass --key or set CAPTIONER_KEY"
    return str(error)


@dataclass(slots=True)
class _State:
    """Pieces of a stream and the result of one clip, as far as they have arrived."""

    pieces: list[str] = field(default_factory=list)
    result: Caption | Exception | None = None


class Run:
    """One run over the clips, `--jobs` at a time; results are printed in the order of the clips."""

    def __init__(self, given: argparse.Namespace, sources: list[Source], service: Service, progress: Progress) -> None:
        self._given = given
        self._sources = sources
        self._service = service
        self._progress = progress
        self._events: queue.SimpleQueue[tuple[int, str, Any]] = queue.SimpleQueue()
        self._states = [_State() for _ in sources]
        self._running: set[int] = set()
        self._failed = 0
        self._printer = output.Printer(sys.stdout, given.format, several=len(sources) > 1)
        self._streams = given.format == "text" and not given.timeline and given.output is None

    def run(self) -> int:
        """Caption all clips; return the exit status."""
        waiting = iter(range(len(self._sources)))
        lock = threading.Lock()
        for _ in range(min(self._given.jobs, len(self._sources))):
            # Daemons: an interrupted command does not wait for answers.
            threading.Thread(target=self._work, args=(waiting, lock), daemon=True).start()
        first = 0
        while first < len(self._sources):
            first = self._print_ready(first)
            with contextlib.suppress(queue.Empty):
                self._handle(*self._events.get(timeout=_POLL_S))
            self._show_progress()
        self._progress.erase()
        return SOME_FAILED if self._failed else DONE

    def _work(self, waiting: Iterator[int], lock: threading.Lock) -> None:
        while True:
            with lock:
                number = next(waiting, None)
            if number is None:
                return
            source = self._sources[number]
            self._put(number, "start", None)
            try:
                result: Caption | Exception = self._service.caption(
                    source.data(partial(self._put, number, "note")),
                    timeline=self._given.timeline,
                    on_text=partial(self._put, number, "text"),
                    on_retry=partial(self._put_retry, number),
                )
            except Exception as error:  # noqa: BLE001 - of any clip; the others go on
                result = error
            self._put(number, "end", result)

    def _put(self, number: int, kind: str, value: Any) -> None:
        self._events.put((number, kind, value))

    def _put_retry(self, number: int, error: ServiceError, pause_s: float) -> None:
        self._put(number, "note", f"{error}; retrying in {pause_s:.1f} s")

    def _handle(self, number: int, kind: str, value: Any) -> None:
        source = self._sources[number]
        match kind:
            case "start":
                self._running.add(number)
            case "note":
                self._say(f"{source.name}: {value}", error=False)
            case "text":
                self._states[number].pieces.append(value)
            case _:
                self._running.discard(number)
                self._states[number].result = value

    def _print_ready(self, first: int) -> int:
        """Print what has arrived for the first clip that is not finished; return the number of the next such clip."""
        while first < len(self._sources):
            source, state = self._sources[first], self._states[first]
            if self._streams:
                for piece in state.pieces:
                    self._progress.erase()
                    self._printer.text(source, piece)
                state.pieces.clear()
            if state.result is None:
                return first
            self._progress.erase()
            match state.result:
                case Caption() as caption:
                    self._deliver(source, caption)
                case error:
                    self._fail(source, error)
            first += 1
        return first

    def _deliver(self, source: Source, caption: Caption) -> None:
        if self._given.output is None:
            self._printer.finish(source, caption)
        else:
            target = output.destination(source, self._given.output, self._given.format)
            try:
                output.write(target, output.render(source, caption, self._given.format))
            except OSError as error:
                self._fail(source, SourceError(f"cannot write {target}: {error.strerror or error}"))
                return
        if caption.finish_reason == "length":
            self._say(f"{source.name}: the caption is cut short by a limit of tokens or time", error=False)
        if caption.stopped:
            self._say(f"{source.name}: the caption was stopped: {caption.stopped}", error=False)

    def _fail(self, source: Source, error: Exception) -> None:
        self._failed += 1
        if self._given.output is None:
            self._printer.fail(source, error)
        if not isinstance(error, (ServiceError, SourceError)):
            error = SourceError(f"{type(error).__name__}: {error}")
        self._say(f"{source.name}: {_with_remedy(error)}", error=True)

    def _say(self, line: str, *, error: bool) -> None:
        self._progress.erase()
        if error:
            fail(line)
        else:
            note(line)

    def _show_progress(self) -> None:
        if self._printer.within_line and sys.stdout.isatty():
            return  # the caption itself shows that something happens
        done = sum(state.result is not None for state in self._states)
        names = ", ".join(self._sources[number].name for number in sorted(self._running)[:2])
        count = f"{done} of {len(self._sources)} done · " if len(self._sources) > 1 else ""
        if names:
            self._progress.show(f"{count}{names}")


def _jobs(word: str) -> int:
    if not word.isdecimal() or not 1 <= int(word) <= _MOST_JOBS:
        raise argparse.ArgumentTypeError(f"must be a whole number, 1 to {_MOST_JOBS}, not {word!r}")
    return int(word)
