"""The real worker, which stands still in the middle of the phase that HOLD_IN names, and writes its process id to HELD.

A tiny model passes every phase faster than an order to cancel travels. What it waits in is Python, which SIGTERM ends
as it ends the work around it.
"""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lmdserve.engine.torch_setup import prepare_torch

prepare_torch()

from lmdserve.engine import checkpoint_writer  # noqa: E402  (after prepare_torch)
from lmdserve.engine.quantize import awq, run  # noqa: E402
from lmdserve.server.job_worker import main  # noqa: E402

# Where each phase has done something and not all: text read and no layer, a layer stored, a shard without a name, all
# files of the checkpoint there.
POINTS: dict[str, tuple[Any, str, int]] = {
    "read": (run._Run, "_evaluated_windows", 1),
    "search": (awq.LayerQuantizer, "quantize", 2),
    "write": (checkpoint_writer.CheckpointWriter, "_rename_shard", 1),
    "evaluate": (run, "evaluate", 1),
}


def holding(work: Callable[..., Any], call: int) -> Callable[..., Any]:
    """Return `work`, which does nothing any more from that call on."""
    calls = 0

    def held(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            Path(os.environ["HELD"]).write_text(str(os.getpid()))
            time.sleep(60)
        return work(*arguments, **options)

    return held


if phase := os.environ.get("HOLD_IN"):
    owner, name, call = POINTS[phase]
    setattr(owner, name, holding(getattr(owner, name), call))
sys.exit(main(sys.argv[1:]))
