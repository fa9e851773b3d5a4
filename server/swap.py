"""One checkpoint takes another's place without a request noticing; and the way back.

Beside: the new one is loaded and warmed up while the old one serves, then new requests go to it, running ones finish
on the old weights, and those are released. Drain, where both do not fit: new requests wait until the running ones are
done, the old weights are released and the new ones loaded; when that fails the old ones are loaded again. Owns the
order of these steps and the history; memory is the loader's business, leases are `serving.py`'s.
"""

import asyncio
import gc
import logging
import uuid
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, Protocol, cast

from lmdserve.engine.api import (
    ConfigError,
    Engine,
    EngineDeadError,
    EngineError,
    EngineInfo,
    Request,
    SamplingParams,
    SwapPlan,
)

from .admin_errors import ConflictError
from .model import ServedModel
from .serving import Serving, Servings, make_serving

logger = logging.getLogger(__name__)

How = Literal["auto", "beside", "drain"]
OnPhase = Callable[[str], None]

HISTORY_LEN = 16
WARM_UP_MESSAGE = "Hello! What can you do for me?"
WARM_UP_TOKENS = 16


class Loader(Protocol):
    """Loads checkpoints, or fakes it. Everything but the folder blocks, and is called on a thread."""

    @property
    def demo_folder(self) -> Path:
        """Where the model in the package lies."""

    def plan(self, folder: Path, running: EngineInfo, *, may_load_beside: bool) -> SwapPlan:
        """Say how the checkpoint takes the running one's place; ConfigError when it cannot be served here."""

    def load(self, folder: Path, *, checkpoint: str) -> tuple[Engine, ServedModel]:
        """Load a checkpoint, called so in replies, into the memory that is left; ConfigError when that fails."""

    def spare_gpu_bytes(self, running: EngineInfo) -> int | None:
        """Return what another process may take of the GPU beside this one at its peak; None where there is no GPU."""

    def quantizing_gpu_bytes(self, folder: Path, *, has_evaluation: bool) -> int:
        """Return about what a process takes of a GPU to quantize the checkpoint; ConfigError when it is none."""


class SwapFailedError(EngineError):
    """The new checkpoint does not serve; the old one does."""


class Target(NamedTuple):
    """A checkpoint to serve, and what it is called in replies."""

    folder: Path
    checkpoint: str


class Swapper:
    """Changes which checkpoint serves, one change at a time. All methods run on the event loop."""

    def __init__(self, servings: Servings, loader: Loader, prompt_threads: Executor) -> None:
        self._servings = servings
        self._loader = loader
        self._prompt_threads = prompt_threads
        self._history: list[Target] = []  # what `rollback` goes back to, last first
        self._turn = asyncio.Lock()
        # cuBLAS keeps memory for every thread that ever called it, too, so one thread loads.
        self._loading_thread = ThreadPoolExecutor(1, thread_name_prefix="lmdserve-load")
        self.can_cancel = False  # the running swap has not changed anything yet

    @property
    def is_busy(self) -> bool:
        """Whether a swap is under way."""
        return self._turn.locked()

    @property
    def previous(self) -> Target | None:
        """What a rollback would go back to."""
        return self._history[-1] if self._history else None

    def close(self) -> None:
        """Let the loading thread end, once no change is under way."""
        self._loading_thread.shutdown(wait=False)

    async def plan(self, target: Target, how: How) -> SwapPlan:
        """Say how the target would take the place of the running checkpoint; ConfigError when it cannot."""
        running = self._servings.current.engine.info
        plan = await asyncio.to_thread(self._loader.plan, target.folder, running, may_load_beside=how != "drain")
        if how == "beside" and plan.how == "drain":
            raise ConflictError(f"how: the checkpoint cannot be loaded beside the running one: {plan.reason}")
        return plan

    async def take_turn(self) -> None:
        """Wait until no other swap is under way, and be the one that is; at once when there is none."""
        await self._turn.acquire()
        self.can_cancel = True

    def end_turn(self) -> None:
        """Let the next one begin."""
        self.can_cancel = False
        self._turn.release()

    async def swap(self, target: Target, plan: SwapPlan, *, drain_timeout_s: float, on_phase: OnPhase) -> None:
        """Serve the target from now on; it is this caller's turn. Raises SwapFailedError, and then nothing changed."""
        old = self._servings.current
        await self._change(target, plan, drain_timeout_s, on_phase)
        self._history = [*self._history, target_of(old)][-HISTORY_LEN:]

    async def roll_back(self, target: Target, plan: SwapPlan, *, drain_timeout_s: float, on_phase: OnPhase) -> None:
        """Serve the target, which is `previous`, again; it is this caller's turn."""
        await self._change(target, plan, drain_timeout_s, on_phase)
        self._history.pop()

    async def _change(self, target: Target, plan: SwapPlan, drain_timeout_s: float, on_phase: OnPhase) -> None:
        logger.info("swapping to %s (%s: %s)", target.checkpoint, plan.how, plan.reason)
        if plan.how == "beside":
            await self._change_beside(target, on_phase)
        else:
            await self._change_after_draining(target, drain_timeout_s, on_phase)
        logger.info("%s serves", target.checkpoint)

    async def _change_beside(self, target: Target, on_phase: OnPhase) -> None:
        old = self._servings.current
        new = await self._load(target, on_phase)
        self.can_cancel = False
        self._servings.add(new)
        self._servings.serve(new)
        on_phase("finish_running")
        await self._servings.wait_until_unused(old)
        on_phase("release")
        await self._release(old)

    async def _change_after_draining(self, target: Target, drain_timeout_s: float, on_phase: OnPhase) -> None:
        old = self._servings.current
        on_phase("finish_running")
        await self._drain(old, drain_timeout_s)
        self.can_cancel = False
        on_phase("release")
        await self._release(old)
        try:
            new = await self._load(target, on_phase)
        except SwapFailedError:
            await self._restore(target_of(old), on_phase)
            raise
        self._servings.add(new)
        self._servings.serve(new)

    async def _drain(self, old: Serving, drain_timeout_s: float) -> None:
        self._servings.hold_back()
        try:
            async with asyncio.timeout(drain_timeout_s):
                await self._servings.wait_until_unused(old)
        except TimeoutError:
            self._servings.resume()
            raise SwapFailedError(
                f"{self._servings.num_leases(old)} requests were still running after {drain_timeout_s:g} s "
                "(drain_timeout); the running checkpoint goes on serving"
            ) from None
        except asyncio.CancelledError:
            self._servings.resume()
            raise

    async def _restore(self, target: Target, on_phase: OnPhase) -> None:
        """Load what served before; without it the server is of no use any more."""
        try:
            old = await self._load(target, on_phase)
        except SwapFailedError as error:
            self._servings.fail(
                EngineDeadError(f"neither the new checkpoint nor the old one could be loaded ({error}); restart")
            )
            return
        self._servings.add(old)
        self._servings.serve(old)

    async def _load(self, target: Target, on_phase: OnPhase) -> Serving:
        """Return the target loaded, started and warmed up; when this is cancelled it is released again."""
        on_phase("load")
        load = partial(self._loader.load, target.folder, checkpoint=target.checkpoint)
        loading = asyncio.get_running_loop().run_in_executor(self._loading_thread, load)
        try:
            engine, model = await asyncio.shield(loading)
        except asyncio.CancelledError:
            await _discard(loading)
            raise
        except ConfigError as error:
            raise SwapFailedError(f"{target.checkpoint} could not be loaded: {error}") from None
        except Exception as error:
            logger.exception("loading %s failed", target.checkpoint)
            raise SwapFailedError(
                f"{target.checkpoint} could not be loaded ({type(error).__name__}: {error}); see the server's log"
            ) from None
        on_phase("warm_up")
        serving = make_serving(engine, model, self._prompt_threads)
        try:
            await engine.start()
            await _warm_up(serving)
        except EngineError as error:
            await _stop_and_release(serving)
            raise SwapFailedError(f"{target.checkpoint} cannot compute: {error}") from None
        except BaseException as error:
            await _stop_and_release(serving)
            if not isinstance(error, Exception):
                raise
            logger.exception("warming up %s failed", target.checkpoint)
            raise SwapFailedError(
                f"{target.checkpoint} cannot compute ({type(error).__name__}: {error}); see the server's log"
            ) from None
        return serving

    async def _release(self, serving: Serving) -> None:
        if serving in self._servings.live:  # not if a swap before this one failed so that nothing serves
            self._servings.remove(serving)
            await _stop_and_release(serving)


def target_of(serving: Serving) -> Target:
    """Return what would bring this one back."""
    return Target(serving.model.folder, serving.model.checkpoint)


async def _stop_and_release(serving: Serving) -> None:
    await serving.engine.stop(0.0)
    serving.close()
    gc.unfreeze()  # what the first engine is made of may be collected from now on
    await asyncio.to_thread(serving.engine.release)


async def _discard(loading: "asyncio.Future[tuple[Engine, ServedModel]]") -> None:
    """Wait for what is being loaded, which cannot be interrupted, and give it back."""
    await asyncio.wait({loading})
    if loading.exception() is None:
        engine, _ = loading.result()
        await engine.stop(0.0)
        await asyncio.to_thread(engine.release)


async def _warm_up(serving: Serving) -> None:
    """Answer a short prompt, which compiles what is compiled at first use and shows that the weights compute."""
    prompt = serving.model.renderer.render([{"role": "user", "content": WARM_UP_MESSAGE}])
    request = Request(
        uid=f"warm-up-{uuid.uuid4().hex}",
        prompt_token_ids=prompt,
        sampling=SamplingParams(temperature=0.0, max_tokens=WARM_UP_TOKENS, ignore_eos=True),
    )
    chunks = cast("aclosing[object]", aclosing(serving.engine.generate(request)))  # type: ignore[type-var]
    async with chunks as stream:
        async for _ in stream:  # type: ignore[attr-defined]
            pass
