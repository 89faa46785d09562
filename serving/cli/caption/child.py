"""`python -m serving.cli.caption.child PARENT COMMAND …`: a command that ends with its parent process."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

from serving.cli.main import main

_PR_SET_PDEATHSIG = 1


def run(words: list[str]) -> int:
    """Run the command; return its exit status. `words[0]` is the process id of the parent."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGTERM))
    if os.getppid() != int(words[0]):  # it had ended before
        return 1
    return main(words[1:])


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
