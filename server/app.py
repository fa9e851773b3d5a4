"""The application around one engine, and `serve`, which runs it until it is told to stop.

`build` wires and starts nothing. Run its result with `listening` or `serve`: they set `handler_cancellation`, without
which aiohttp lets the handler of a client that has left run to its end.
"""

import asyncio
import logging
import signal
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

from aiohttp import web

from lmdserve.engine.api import Engine

from .address import cannot_listen
from .admin import make_admin
from .auth import AdminDoor, KeyRing
from .config import ServerConfig, check_admin
from .http_log import logger as http_logger
from .metrics import ServerMetrics
from .middleware import MIDDLEWARES, add_headers
from .model import ServedModel
from .routes import routes
from .services import SERVICES, Lifecycle, Phase, Services
from .serving import Servings, make_serving
from .swap import Loader
from .worker_process import WORKER_COMMAND

logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 16 * 2**20  # about 4 million tokens of text; no context is that long
NUM_PROMPT_THREADS = 2
FLUSH_TIMEOUT_S = 2.0  # for last bytes to leave once the engine has stopped
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def build(
    engine: Engine,
    model: ServedModel,
    config: ServerConfig,
    *,
    loader: Loader | None = None,
    worker_command: Sequence[str] = WORKER_COMMAND,
) -> web.Application:
    """Return the application that serves `model` on `engine`; it starts the engine, and stops it when it ends.

    `loader` loads the checkpoints that orders name; without one none are taken. `worker_command` begins the command
    line of quantizing processes.
    """
    check_admin(config)
    app = web.Application(middlewares=MIDDLEWARES, client_max_size=MAX_BODY_BYTES)
    prompt_threads = ThreadPoolExecutor(NUM_PROMPT_THREADS, thread_name_prefix="lmdserve-prompt")
    servings = Servings(make_serving(engine, model, prompt_threads))
    admin = None
    if config.is_admin_open and config.models_dir is not None and loader is not None:
        admin = make_admin(servings, Path(config.models_dir), loader, prompt_threads, worker_command)
    app[SERVICES] = Services(
        servings=servings,
        config=config,
        keys=KeyRing(config.api_keys),
        admin_door=AdminDoor(config),
        admin=admin,
        metrics=ServerMetrics(),
        lifecycle=Lifecycle(),
        prompt_threads=prompt_threads,
    )
    app.add_routes(routes())
    app.on_response_prepare.append(add_headers)
    app.cleanup_ctx.append(_run_engine)
    app.on_shutdown.append(_stop_engine)
    return app


async def serve(app: web.Application, config: ServerConfig, *, on_listening: Callable[[str], None]) -> int:
    """Serve until SIGTERM or Ctrl-C, let running requests finish, and return the exit status.

    `on_listening` gets the bound URL. A second signal ends the wait for running requests at once.
    """
    with _stop_signals() as signals:  # also while connections close: an impatient Ctrl-C cuts nothing short
        async with listening(app, config) as url:
            on_listening(url)
            name = await signals.get()
            await _drain(app[SERVICES], name, signals)
    return 0


@asynccontextmanager
async def listening(app: web.Application, config: ServerConfig) -> AsyncIterator[str]:
    """Run the application on its address while the context lasts; gives the URL, with the real port."""
    runner = web.AppRunner(
        app, handler_cancellation=True, access_log=None, logger=http_logger, shutdown_timeout=FLUSH_TIMEOUT_S
    )
    await runner.setup()
    try:
        await _bind(runner, config)
        port = runner.addresses[0][1]
        host = f"[{config.server_name}]" if ":" in config.server_name else config.server_name
        yield f"http://{host}:{port}"
    finally:
        await runner.cleanup()


async def _bind(runner: web.AppRunner, config: ServerConfig) -> None:
    try:
        await web.TCPSite(runner, config.server_name, config.server_port).start()
    except OSError as error:
        raise cannot_listen(config.server_name, config.server_port, error) from error


async def _run_engine(app: web.Application) -> AsyncGenerator[None, None]:
    services = app[SERVICES]
    await services.servings.current.engine.start()
    services.lifecycle.phase = Phase.RUNNING
    if services.admin is not None:
        services.admin.jobs.start()
    lag_task = asyncio.create_task(services.metrics.watch_loop_lag())
    yield
    lag_task.cancel()
    await asyncio.gather(lag_task, return_exceptions=True)
    services.prompt_threads.shutdown(wait=False, cancel_futures=True)
    for serving in services.servings.live:
        serving.close()


async def _stop_engine(app: web.Application) -> None:
    """End what still runs, before connections close: a stream that is cut short gets its error event."""
    services = app[SERVICES]
    services.lifecycle.phase = Phase.DRAINING
    services.servings.close()
    stops = [serving.engine.stop(0.0) for serving in services.servings.live]
    await asyncio.gather(*stops, *([services.admin.jobs.stop()] if services.admin is not None else []))


async def _drain(services: Services, signal_name: str, signals: "asyncio.Queue[str]") -> None:
    """Refuse new requests and wait for the running ones: to their end, the time limit, or the next signal."""
    lifecycle, timeout_s = services.lifecycle, services.config.shutdown_timeout
    lifecycle.phase = Phase.DRAINING
    if not lifecycle.num_working:
        logger.info("%s: stopping", signal_name)
        return
    logger.info("%s: running requests (%d) get up to %g s to end", signal_name, lifecycle.num_working, timeout_s)
    waits = {asyncio.create_task(lifecycle.wait_until_idle()), asyncio.create_task(signals.get())}
    await asyncio.wait(waits, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    for wait in waits:
        wait.cancel()
    await asyncio.gather(*waits, return_exceptions=True)
    if lifecycle.num_working:
        logger.warning("stopping with requests unfinished (%d)", lifecycle.num_working)


@contextmanager
def _stop_signals() -> "Iterator[asyncio.Queue[str]]":
    """Catch the stop signals into a queue while the context lasts."""
    loop = asyncio.get_running_loop()
    signals: asyncio.Queue[str] = asyncio.Queue()
    for number in STOP_SIGNALS:
        loop.add_signal_handler(number, signals.put_nowait, number.name)
    try:
        yield signals
    finally:
        for number in STOP_SIGNALS:
            loop.remove_signal_handler(number)
