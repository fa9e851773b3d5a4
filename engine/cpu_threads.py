"""How torch's CPU threads wait for each other. No torch here: this must run before torch is imported."""

import os


def wait_patiently() -> None:
    """Let OpenMP's threads sleep instead of spin while they wait, unless the user chose otherwise.

    The event loop, other programs and torch share the cores. A spinning thread burns the time slice that the thread it
    waits for needs: on two cores beside one busy program a step of the demo model took 52 ms spinning and 11 ms
    sleeping at one stream, 808 ms and 65 ms at 32. On idle cores the two are equal.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
