"""`lmdserve quantize MODEL`, and LMDeploy's spelling `lmdserve lite auto_awq MODEL`: options -> a run -> its progress.

Owns how progress is shown: a bar on the terminal, or JSON objects on stdout, one a line, which is how the admin
endpoint's worker speaks. What is done is `engine/quantize`'s business.
"""

import argparse
import dataclasses
import json
import logging
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from lmdserve.engine.api import ConfigError
from lmdserve.engine.quantize.options import QuantizeOptions
from lmdserve.engine.quantize.progress import Progress
from lmdserve.engine.torch_setup import prepare_torch

from .options import OptionParser, add_options, read_options, suggestion

if TYPE_CHECKING:
    from rich.progress import TaskID

Show = Callable[[Progress], None]

_STATUS_OF_BAD_INPUT = 2
_STATUS_OF_SIGTERM = 128 + signal.SIGTERM
_LITE_METHODS = ("auto_awq",)
# LMDeploy up to 0.6 took a value after these, and tutorials still write it.
_FLAGS_WITH_A_VALUE = ("--search-scale", "--search_scale", "--w-sym", "--w_sym")
_BOOLEANS = {"true": True, "false": False}


def quantize(arguments: Sequence[str]) -> int:
    """`lmdserve quantize MODEL --work-dir OUT`."""
    parser = OptionParser(prog="lmdserve quantize", usage="lmdserve quantize MODEL --work-dir OUT [options]")
    parser.add_argument("model", metavar="MODEL", help="local folder, hub name, or `demo` for the model in the package")
    parser.add_argument("--revision", help="branch, tag or commit, for a hub name")
    parser.add_argument(
        "--progress",
        choices=("bar", "json", "none"),
        default="bar",
        help="what to show: a bar, JSON objects on stdout, one a line, or nothing (default: %(default)s)",
    )
    add_options(parser, QuantizeOptions, title="quantization")
    namespace = parser.parse_known(_without_values(arguments))
    logging.basicConfig(level="WARNING", format="%(levelname)s: %(message)s")
    return _shown_as_json(namespace) if namespace.progress == "json" else _shown_to_people(namespace)


def lite(arguments: Sequence[str]) -> int:
    """`lmdserve lite auto_awq MODEL`, LMDeploy's spelling of the same."""
    method = arguments[0] if arguments else ""
    if method not in _LITE_METHODS:
        known = ", ".join(_LITE_METHODS)
        raise ConfigError(f"`lmdserve lite` has no {method!r}{suggestion(method, _LITE_METHODS)}; it has {known}")
    return quantize(arguments[1:])


def _shown_as_json(namespace: argparse.Namespace) -> int:
    def show(progress: Progress) -> None:
        if progress.phase != "done":
            _print_json(dataclasses.asdict(progress))

    try:
        output = _run(namespace, show)
    except ConfigError as error:
        _print_json({"phase": "error", "message": str(error)})
        return _STATUS_OF_BAD_INPUT
    except (OSError, RuntimeError) as error:
        _print_json({"phase": "error", "message": _one_line(error)})
        return 1
    _print_json({"phase": "done", "output": str(output), "report": str(output / "report.json")})
    return 0


def _shown_to_people(namespace: argparse.Namespace) -> int:
    try:
        with _no_bar() if namespace.progress == "none" else _bar() as show:
            output = _run(namespace, show)
    except OSError as error:  # a full disk, above all
        print(f"lmdserve: error: {_one_line(error)}; what is done is kept, so --resume goes on", file=sys.stderr)
        return 1
    from lmdserve.engine.quantize.report import read_report, report_table

    print(report_table(read_report(output)))
    print(f"\n{output} is ready: lmdserve --model {output}")
    return 0


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM end the run as Ctrl-C does, between two operations, with a status of its own."""
    has_come = False

    def end(signal_number: int, frame: FrameType | None) -> NoReturn:
        nonlocal has_come
        has_come = True
        raise SystemExit(_STATUS_OF_SIGTERM)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    except Exception:
        if has_come:  # while native code ran, which made an error of its own of it: safetensors reading a tensor does
            raise SystemExit(_STATUS_OF_SIGTERM) from None
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


@_ended_by_sigterm()
def _run(namespace: argparse.Namespace, show: Show) -> Path:
    options = read_options(QuantizeOptions, namespace)
    prepare_torch()
    from lmdserve.engine.model_folder import resolve_model_folder
    from lmdserve.engine.quantize.run import TextSide
    from lmdserve.engine.quantize.run import quantize as run

    from .calibration_text import load_encoders

    folder = resolve_model_folder(namespace.model, namespace.revision)
    return run(folder, options, TextSide(*load_encoders(folder)), show)


@contextmanager
def _no_bar() -> Iterator[Show]:
    yield lambda progress: None


@contextmanager
def _bar() -> Iterator[Show]:
    """Yield what shows progress as a bar; where there is no terminal, as a line for each layer."""
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as RichProgress

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _line_printer()
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %{task.fields[left]}"),
    )
    with RichProgress(*columns, console=console, transient=True) as bar:
        task: TaskID = bar.add_task("", total=100, left="")

        def show(progress: Progress) -> None:
            bar.update(task, description=_what(progress), completed=progress.percent, left=_left(progress))

        yield show


def _line_printer() -> Show:
    printed: list[str] = []

    def show(progress: Progress) -> None:
        what = _what(progress)
        if what not in printed[-1:]:
            print(f"{what}: {progress.percent:.0f} %{_left(progress)}", file=sys.stderr, flush=True)
            printed.append(what)

    return show


def _what(progress: Progress) -> str:
    layer = "" if progress.layer is None else f" layer {progress.layer + 1} of {progress.num_layers}"
    return f"{progress.phase}{layer}"


def _left(progress: Progress) -> str:
    if not progress.seconds_left:
        return ""
    minutes, seconds = divmod(round(progress.seconds_left), 60)
    return f", {minutes}:{seconds:02} left"


def _print_json(value: object) -> None:
    print(json.dumps(value, ensure_ascii=False), flush=True)


def _one_line(error: Exception) -> str:
    return " ".join((str(error) or repr(error)).split())


def _without_values(arguments: Sequence[str]) -> list[str]:
    """Turn `--search-scale True` into the flag, and `--search-scale False` into its opposite."""
    kept: list[str] = []
    for argument in arguments:
        value = _BOOLEANS.get(argument.lower())
        if value is None or not kept or kept[-1] not in _FLAGS_WITH_A_VALUE:
            kept.append(argument)
        elif not value:
            kept[-1] = f"--no-{kept[-1][2:]}"
    return kept
