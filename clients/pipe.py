"""Standard output whose reader has gone, as in `... | head`."""

import os
import sys


def silence_stdout() -> None:
    """Send what is still to be written to nowhere; without this, the interpreter complains when it flushes at exit."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)
