"""`python -m lmdserve.clients.bench URL`: load a server and print how it held up.

Owns the command line. bench_workload.py says what is sent, bench_run.py sends it, bench_report.py counts. Progress and
errors go to standard error, results to standard output; the exit status is 1 when a request failed or was not sent.
"""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .api_client import DEFAULT_URL, EXIT_INTERRUPTED, add_api_key_argument
from .settings import SettingError

if TYPE_CHECKING:
    from .bench_report import LevelReport
    from .bench_workload import BenchOptions
    from .http import AsyncClient

MAX_PROMPTS = 1_000_000
MAX_CONCURRENCY = 10_000
MAX_TOKENS = 1_000_000
MAX_SHOWN_ERRORS = 3


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="bench", description="Load an OpenAI-compatible server and print throughput and latencies."
    )
    add_arguments(parser)
    return run_bench(parser.parse_args(argv))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the benchmark's options to `parser`; `run_bench` takes what it parses."""
    add = parser.add_argument
    count, tokens = _whole_number(1, MAX_PROMPTS), _whole_number(1, MAX_TOKENS)
    add("url", nargs="?", default=DEFAULT_URL, metavar="URL", help="server (default: %(default)s)")
    add("--model", metavar="NAME", help="model to ask (default: the first that the server offers)")
    add_api_key_argument(parser)
    add("--endpoint", choices=("chat", "completions"), default="chat", help="API to use (default: %(default)s)")
    add(
        "--concurrency",
        type=_levels,
        default="8",
        metavar="N[,N...]",
        help="requests at once; a table each (default: %(default)s)",
    )
    add("--num-prompts", type=count, default=50, metavar="N", help="requests of each level (default: %(default)s)")
    add(
        "--input-len",
        type=tokens,
        default=128,
        metavar="TOKENS",
        help="length of random prompts (default: %(default)s)",
    )
    add(
        "--output-len",
        type=tokens,
        default=128,
        metavar="TOKENS",
        help="most tokens of an answer (default: %(default)s)",
    )
    add(
        "--range-ratio",
        type=_share,
        default=0.0,
        metavar="R",
        help="vary both lengths by up to this share (default: %(default)g)",
    )
    add("--dataset", type=Path, metavar="FILE", help="JSON lines with `messages` or `prompt`, and maybe `max_tokens`")
    add(
        "--request-rate",
        type=_rate,
        default=math.inf,
        metavar="RPS",
        help="mean arrivals per second, Poisson (default: %(default)g)",
    )
    add(
        "--disconnect-share",
        type=_share,
        default=0.0,
        metavar="R",
        help="share of clients that leave early (default: %(default)g)",
    )
    add("--ignore-eos", action="store_true", help="make every answer as long as --output-len")
    add(
        "--temperature", type=_temperature, default=0.0, metavar="T", help="sampling temperature (default: %(default)s)"
    )
    add(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="of prompts, lengths, arrivals, departures (default: %(default)s)",
    )
    add(
        "--num-warmups",
        type=_whole_number(0, 1000),
        default=1,
        metavar="N",
        help="requests before the clock (default: %(default)s)",
    )
    add(
        "--max-duration", type=_seconds, default=600.0, metavar="S", help="time limit of a level (default: %(default)s)"
    )
    add(
        "--request-timeout",
        type=_seconds,
        default=300.0,
        metavar="S",
        help="time limit of a request (default: %(default)s)",
    )
    add("--json", metavar="FILE", help="also write the results there; - prints them instead of the tables")


def run_bench(arguments: argparse.Namespace) -> int:
    """Run the benchmark that `add_arguments` described and return the exit status."""
    import asyncio

    from .http import AsyncClient
    from .pipe import silence_stdout
    from .wire import ClientError

    try:
        client = AsyncClient(arguments.url, arguments.api_key, silence_timeout_s=arguments.request_timeout)
        return asyncio.run(_run(client, arguments))
    except (ClientError, SettingError, ValueError) as error:
        _log(f"error: {error}")
        return 1
    except BrokenPipeError:
        silence_stdout()
        return 1
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


async def _run(client: "AsyncClient", arguments: argparse.Namespace) -> int:
    from .bench_report import comparison, table

    async with client:
        options = await _options(client, arguments)
        reports = await _run_levels(client, options, arguments)
    if arguments.json != "-":
        print("\n\n".join(table(report) for report in reports))
        if len(reports) > 1:
            print(f"\n{comparison(reports)}")
    if arguments.json:
        _write_json(arguments.json, client.base_url, options, reports)
    return 0 if all(report.is_complete for report in reports) else 1


async def _options(client: "AsyncClient", arguments: argparse.Namespace) -> "BenchOptions":
    from .bench_workload import BenchOptions
    from .conversation import check_model

    names = await client.models()
    if arguments.model is not None:
        check_model(arguments.model, names)
    elif not names:
        raise SettingError(f"{client.base_url} offers no model")
    return BenchOptions(
        model=arguments.model or names[0],
        endpoint=arguments.endpoint,
        num_prompts=arguments.num_prompts,
        input_len=arguments.input_len,
        output_len=arguments.output_len,
        range_ratio=arguments.range_ratio,
        dataset_path=arguments.dataset,
        request_rate=arguments.request_rate,
        disconnect_share=arguments.disconnect_share,
        ignore_eos=arguments.ignore_eos,
        temperature=arguments.temperature,
        seed=arguments.seed,
        max_duration_s=arguments.max_duration,
        request_timeout_s=arguments.request_timeout,
    )


async def _run_levels(
    client: "AsyncClient", options: "BenchOptions", arguments: argparse.Namespace
) -> "list[LevelReport]":
    from dataclasses import replace

    from .bench_report import summarize
    from .bench_run import calibrate, run_level, warm_up
    from .bench_workload import plan_level

    calibration = None if options.dataset_path else await calibrate(client, options)
    staying = replace(options, num_prompts=arguments.num_warmups, disconnect_share=0.0)
    await warm_up(client, options, plan_level(staying, -1, calibration))
    reports = []
    for level, concurrency in enumerate(arguments.concurrency):
        _log(f"{options.num_prompts} requests, {concurrency} at once ...")
        requests = plan_level(options, level, calibration)
        result = await run_level(client, options, requests, concurrency=concurrency)
        report = summarize(result, request_rate=options.request_rate)
        for message, count in list(report.errors.items())[:MAX_SHOWN_ERRORS]:
            _log(f"{count} failed: {message}")
        reports.append(report)
    return reports


def _write_json(target: str, url: str, options: "BenchOptions", reports: "list[LevelReport]") -> None:
    import json
    from dataclasses import asdict
    from datetime import UTC, datetime

    from .bench_report import as_json

    settings: dict[str, Any] = asdict(options)
    settings["dataset_path"] = options.dataset_path and str(options.dataset_path)
    settings["request_rate"] = options.request_rate if options.request_rate < math.inf else None
    record = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "url": url,
        "settings": settings,
        "levels": [as_json(report) for report in reports],
    }
    text = json.dumps(record, indent=2) + "\n"
    if target == "-":
        sys.stdout.write(text)
        return
    try:
        Path(target).write_text(text, encoding="utf-8")
    except OSError as error:
        raise SettingError(f"cannot write {target}: {error.strerror}") from None


def _log(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr)


def _whole_number(least: int, most: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if not least <= number <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} to {most}")
        return number

    return parse


def _levels(text: str) -> tuple[int, ...]:
    return tuple(_whole_number(1, MAX_CONCURRENCY)(part) for part in text.split(","))


def _share(text: str) -> float:
    return _float_between(text, 0.0, 1.0)


def _temperature(text: str) -> float:
    return _float_between(text, 0.0, 2.0)


def _rate(text: str) -> float:
    return _float_between(text, 1e-6, math.inf)


def _seconds(text: str) -> float:
    return _float_between(text, 1e-3, 86_400.0)


def _float_between(text: str, least: float, most: float) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not least <= number <= most:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from {least:g} to {most:g}")
    return number


if __name__ == "__main__":
    sys.exit(main())
