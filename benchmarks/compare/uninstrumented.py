"""`captioner …` without metrics, logs or traces: the reference of `instrumentation.py`.

    python -m benchmarks.compare.uninstrumented serve …

The service has no such switch, since nobody should run it so. This program imports the service, unlike the other
comparisons: it replaces the recording of a finished request by nothing, and changes nothing else.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

from serving.cli import main as cli
from serving.observability import metrics


def _finish_unrecorded(self: Any, *_: object) -> None:
    """Finish a request without a record."""
    self._in_flight.dec()


def main() -> int:
    """Run the command line."""
    metrics.Metrics.finish = _finish_unrecorded  # type: ignore[method-assign, assignment]
    serve = cli._Server.run  # noqa: SLF001 - see above

    async def run_quietly(self: Any) -> int:
        logging.getLogger("serving.observability.metrics").disabled = True
        return await serve(self)

    cli._Server.run = run_quietly  # type: ignore[method-assign]  # noqa: SLF001
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
