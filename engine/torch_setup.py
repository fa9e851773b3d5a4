"""What has to be settled before torch is imported. No torch here."""

import os
import warnings


def prepare_torch() -> None:
    """Let OpenMP's threads sleep instead of spin while they wait (unless the user chose otherwise), and keep torch
    from warning that numpy, which nothing here needs, is not installed.

    The event loop, other programs and torch share the cores. A spinning thread burns the time slice that the thread it
    waits for needs: on two cores beside one busy program a step of a model of the demo's size took 52 ms spinning and
    11 ms sleeping at one stream, 808 ms and 65 ms at 32.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
