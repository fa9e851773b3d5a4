"""The command `lmdserve`: arguments -> configs -> engine -> app. The only place that wires the house together.

Everything heavy (torch, aiohttp) is imported inside the functions that need it, so that `--help` answers at once.
"""

import argparse
import asyncio
import dataclasses
import gc
import logging
import os
import secrets
import signal
import sys
import threading
from collections.abc import Callable, Collection, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lmdserve import __version__
from lmdserve.engine.api import ENGINE_THREAD_PREFIX, ConfigError, Engine
from lmdserve.engine.config import ByteCount, EngineConfig

from .address import check_address
from .config import ServerConfig, check_admin
from .loading import EngineLoader
from .options import OptionParser, add_options, read_options, reader, suggestion

if TYPE_CHECKING:
    from lmdserve.clients.options import ReplOptions

    from .model import ServedModel

OVERVIEW = """\
usage: lmdserve [serve] [--model M] [options]   serve a model over the OpenAI API (the default)
       lmdserve chat [M] [options]              talk to a model in this terminal, no server needed
       lmdserve plan [M] [options]              print what fits into memory; loads nothing
       lmdserve bench [URL] [options]           measure a running server
       lmdserve quantize M --work-dir OUT       make a 4-bit checkpoint (AWQ) and measure what it cost
       lmdserve evaluate A --against B          measure a checkpoint, alone or against another
       lmdserve convert M OUT --to FORMAT       write a 4-bit checkpoint in another format, or as 16-bit weights
       lmdserve COMMAND --help | --version
"""
SETTLING_S = 5.0  # after the start, when nobody waits for the first answer any more


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (without the program's name) and return its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in ("-V", "--version"):
        print(f"lmdserve {__version__}")
        return 0
    name = arguments.pop(0) if arguments and not arguments[0].startswith("-") else "serve"
    command = COMMANDS.get(name)
    if command is None:
        known = ", ".join(COMMANDS)
        print(f"lmdserve: error: unknown command {name!r}{suggestion(name, COMMANDS)}; the commands are {known}, "
              "and a model is named with --model", file=sys.stderr)  # fmt: skip
        return 2
    try:
        return command(arguments)
    except ConfigError as error:
        print(f"lmdserve: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def serve(arguments: Sequence[str]) -> int:
    """`lmdserve [serve]`: load the model, listen, and stop cleanly on SIGTERM or Ctrl-C."""
    if arguments[:1] == ["api_server"]:  # LMDeploy's spelling: `serve api_server M`
        arguments = arguments[1:]
    parser = OptionParser(prog="lmdserve", usage=OVERVIEW.removeprefix("usage: ").rstrip())
    engine_config, server_config, _ = _parse(parser, arguments, log_level="INFO")
    server_config = _with_keys_from_environment(server_config)
    check_admin(server_config)
    check_address(server_config.server_name, server_config.server_port)
    loader = EngineLoader(engine_config, server_config)
    with _ended_at_once():
        engine, model = loader.load_first()
        from .app import build
        from .app import serve as run_app

    app = build(engine, model, server_config, loader=loader)

    def announce(url: str) -> None:
        print(
            f"lmdserve {__version__} serves {model.name!r} at {url} (OpenAI API: {url}/v1); Ctrl-C stops it", flush=True
        )
        asyncio.get_running_loop().call_later(SETTLING_S, _spare_the_collector)

    return _run(run_app(app, server_config, on_listening=announce))


def _spare_the_collector() -> None:
    """Leave what the start has made out of garbage collections: a full one takes 120 ms; large requests cause it."""
    gc.collect()
    gc.freeze()


def chat(arguments: Sequence[str]) -> int:
    """`lmdserve chat M`: api_client on a server of its own that only this process can use."""
    from lmdserve.clients.api_client import piped_message
    from lmdserve.clients.options import add_arguments, options_from
    from lmdserve.clients.settings import SettingError

    parser = OptionParser(prog="lmdserve chat", usage="lmdserve chat [M] [options]")
    add_arguments(parser.add_argument_group("conversation"))
    engine_config, server_config, namespace = _parse(
        parser, arguments, log_level="WARNING", only=("chat_template", "log_level")
    )
    try:
        repl_options = options_from(namespace, model=None)
    except SettingError as error:
        parser.error(str(error))
    server_config = dataclasses.replace(
        server_config, server_name="127.0.0.1", server_port=0, api_keys=(secrets.token_urlsafe(),), shutdown_timeout=1.0
    )
    message = piped_message()
    with _ended_at_once():
        engine, model = EngineLoader(engine_config, server_config).load_first()
    return _run(_chat(engine, model, server_config, repl_options, message))


async def _chat(
    engine: Engine, model: "ServedModel", config: ServerConfig, options: "ReplOptions", message: str | None
) -> int:
    from lmdserve.clients.api_client import talk
    from lmdserve.clients.http import AsyncClient

    from .app import build, listening

    async with listening(build(engine, model, config), config) as url:
        return await talk(AsyncClient(url, config.api_keys[0]), options, message)


def plan(arguments: Sequence[str]) -> int:
    """`lmdserve plan M`: the memory plan that a server with these options would make, for every KV policy."""
    parser = OptionParser(prog="lmdserve plan", usage="lmdserve plan [M] [options]")
    parser.add_argument(
        "--gpu-memory",
        type=reader(ByteCount),
        metavar="MEMORY",
        help="plan for an empty GPU of this size, such as 24GiB, in place of the device that is here",
    )
    engine_config, _, namespace = _parse(parser, arguments, log_level="ERROR", only=())
    from lmdserve.engine.memory_table import plan_table

    print(plan_table(engine_config, gpu_bytes=namespace.gpu_memory))
    return 0


def bench(arguments: Sequence[str]) -> int:
    """`lmdserve bench URL`: the load generator of `clients/bench.py`."""
    from lmdserve.clients.bench import add_arguments, run_bench

    parser = OptionParser(prog="lmdserve bench", usage="lmdserve bench [URL] [options]")
    add_arguments(parser)
    return run_bench(parser.parse_known(arguments))


def quantize(arguments: Sequence[str]) -> int:
    """`lmdserve quantize M --work-dir OUT`: `server/quantize_command.py`."""
    from .quantize_command import quantize as run

    return run(arguments)


def evaluate(arguments: Sequence[str]) -> int:
    """`lmdserve evaluate A [--against B]`: `server/evaluate_command.py`."""
    from .evaluate_command import evaluate as run

    return run(arguments)


def convert(arguments: Sequence[str]) -> int:
    """`lmdserve convert M OUT --to FORMAT`: `server/convert_command.py`."""
    from .convert_command import convert as run

    return run(arguments)


def lite(arguments: Sequence[str]) -> int:
    """`lmdserve lite auto_awq M`: LMDeploy's spelling of `quantize`."""
    from .quantize_command import lite as run

    return run(arguments)


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "serve": serve,
    "chat": chat,
    "plan": plan,
    "bench": bench,
    "quantize": quantize,
    "evaluate": evaluate,
    "convert": convert,
    "lite": lite,
}


def _parse(
    parser: OptionParser, arguments: Sequence[str], *, log_level: str, only: Collection[str] | None = None
) -> tuple[EngineConfig, ServerConfig, argparse.Namespace]:
    parser.add_argument("model_argument", nargs="?", metavar="M", help=argparse.SUPPRESS)
    add_options(parser, EngineConfig, title="model and engine")
    add_options(parser, ServerConfig, title="server", only=only)
    parser.set_defaults(log_level=log_level)
    namespace = parser.parse_known(arguments)
    if namespace.model_argument is not None:
        namespace.model = namespace.model_argument
    engine_config, server_config = read_options(EngineConfig, namespace), read_options(ServerConfig, namespace)
    logging.basicConfig(level=server_config.log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    return engine_config, server_config, namespace


@contextmanager
def _ended_at_once() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM end the process at once while the context lasts.

    Nothing is there yet that would have to be tidied up, and a KeyboardInterrupt inside of torch's imports comes out as
    an ImportError, or late.
    """
    # The kernel spares a container's first process the default action.
    action = _exit_at_once if os.getpid() == 1 else signal.SIG_DFL
    previous = {number: signal.signal(number, action) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _exit_at_once(number: int, _: object) -> None:
    os._exit(128 + number)


def _with_keys_from_environment(config: ServerConfig) -> ServerConfig:
    api_keys = _joined(config.api_keys, "LMDSERVE_API_KEYS")
    return dataclasses.replace(config, api_keys=api_keys, admin_keys=_joined(config.admin_keys, "LMDSERVE_ADMIN_KEYS"))


def _joined(keys: Sequence[str], variable: str) -> tuple[str, ...]:
    from_environment = (key.strip() for key in os.environ.get(variable, "").split(","))
    return tuple(dict.fromkeys((*keys, *filter(None, from_environment))))


def _run(main_task: Coroutine[Any, Any, int]) -> int:
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        status = runner.run(main_task)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # all has ended; one more Ctrl-C would only spoil the exit status
    if any(thread.name.startswith(ENGINE_THREAD_PREFIX) for thread in threading.enumerate()):
        # A step that hangs cannot be interrupted, and the interpreter would wait for its thread for ever.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status
