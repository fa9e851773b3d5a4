"""Ctrl-C that stops a piece of work and not the program."""

import asyncio
import signal
from collections.abc import Coroutine
from typing import Any


async def run_interruptible(work: Coroutine[Any, Any, None]) -> bool:
    """Await `work` and return True; when Ctrl-C comes first, cancel it, wait until it has cleaned up, return False.

    Must run in the main thread. While it runs, SIGINT belongs to it; the handler found before is put back.
    """
    loop = asyncio.get_running_loop()
    task = loop.create_task(work)
    was_interrupted = False

    def stop() -> None:
        nonlocal was_interrupted
        was_interrupted = True
        task.cancel()

    previous = signal.getsignal(signal.SIGINT)
    loop.add_signal_handler(signal.SIGINT, stop)
    try:
        await task
    except asyncio.CancelledError:
        caller = asyncio.current_task()
        if not was_interrupted or (caller is not None and caller.cancelling()):
            raise
        return False
    finally:
        loop.remove_signal_handler(signal.SIGINT)
        if previous is not None:  # None: a handler that was not set from Python
            signal.signal(signal.SIGINT, previous)
    return True
