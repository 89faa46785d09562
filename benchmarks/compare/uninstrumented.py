"""`captioner …` without metrics, logs or traces: the reference of `instrumentation.py`.

    python -m benchmarks.compare.uninstrumented serve …

The service has no such switch, since nobody should run it so. This program imports the service, unlike the other
comparisons: it replaces the recording of a finished request by nothing, and changes nothing else.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

from serving.cli.main import main as run_command
from serving.cli.serve import ServiceRun
from serving.observability import metrics


def _finish_unrecorded(self: Any, *_: object) -> None:
    """Finish a request without a record."""
    self._in_flight.dec()


def main() -> int:
    """Run the command line."""
    metrics.Metrics.finish = _finish_unrecorded  # type: ignore[method-assign, assignment]
    serve = ServiceRun.run

    async def run_quietly(self: Any) -> int:
        logging.getLogger("serving.observability.request_record").disabled = True
        return await serve(self)

    ServiceRun.run = run_quietly  # type: ignore[method-assign]
    return run_command()


if __name__ == "__main__":
    sys.exit(main())
