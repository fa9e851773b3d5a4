"""The process that quantizes for a server: `python -m lmdserve.server.job_worker PARENT [--gpu-bytes N] ARGUMENTS`.

Makes itself the least important thing on the machine, and mortal with its server, and becomes `lmdserve quantize
ARGUMENTS`.
"""

import ctypes
import os
import signal
import sys

LOWEST_PRIORITY = 19
_PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> int:
    """Run; PARENT is the process id of the server."""
    _die_with(int(arguments.pop(0)))
    os.nice(LOWEST_PRIORITY)
    if arguments[0] == "--gpu-bytes":
        _limit_gpu_memory(int(arguments[1]))
        arguments = arguments[2:]
    from .cli import main as run

    return run(["quantize", *arguments])


def _die_with(parent: int) -> None:
    """Be killed as soon as the parent is gone, which leaves what a later run resumes."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the kernel was asked
        sys.exit(1)


def _limit_gpu_memory(num_bytes: int) -> None:
    """Let torch take so much, less what the process takes without it."""
    from lmdserve.engine.memory_sizes import CONTEXT_BYTES
    from lmdserve.engine.torch_setup import prepare_torch

    prepare_torch()
    import torch

    if torch.cuda.is_available():
        total = torch.cuda.mem_get_info()[1]
        torch.cuda.set_per_process_memory_fraction(min(1.0, max(0, num_bytes - CONTEXT_BYTES) / total))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
