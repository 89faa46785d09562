"""`captioner …` without metrics, logs or traces: what `instrumentation.py` compares with.

The service has no such switch, since nobody should run it so. This program is the one place in `benchmarks` that
imports it: it replaces the record's telling by nothing, and leaves all else as it is.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

from serving.cli import main as cli
from serving.observability import metrics


def _tell_nothing(self: Any, *_: object) -> None:
    """End a request, untold."""
    self._in_flight.dec()


def main() -> int:
    """Run the command line."""
    metrics.Metrics.finish = _tell_nothing  # type: ignore[method-assign, assignment]
    serve = cli._Server.run  # noqa: SLF001 - see above

    async def quiet(self: Any) -> int:
        logging.getLogger("serving.observability.metrics").disabled = True
        return await serve(self)

    cli._Server.run = quiet  # type: ignore[method-assign]  # noqa: SLF001
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
