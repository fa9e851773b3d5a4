"""The Berkeley function-calling data set as request bodies: how many are accepted, and how many calls are valid.

`pip download --no-deps bfcl-eval` and unzip the wheel; `python benchmarks/bfcl.py bfcl_eval/data` then asks servers
whose model writes at random, one of every tool format. The judge is `jsonschema`, with the tools' sloppy types made
proper. Each case is asked under tool_choice "required" and "auto", one of them streamed.
"""

import argparse
import asyncio
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from random_replies import Score, ask, format_names, judge_calls, serving

from lmdserve.clients.http import AsyncClient
from lmdserve.tools.schema import normalize_tools

MAX_TOKENS = 1000
COLUMNS = ("sent", "accepted", "calls", "valid", "cut")
_DOCUMENTS = {
    "GorillaFileSystem": "gorilla_file_system", "MathAPI": "math_api", "MessageAPI": "message_api",
    "TwitterAPI": "posting_api", "TicketAPI": "ticket_api", "TradingBot": "trading_bot", "TravelAPI": "travel_booking",
    "VehicleControlAPI": "vehicle_control", "WebSearchAPI": "web_search", "MemoryAPI": "memory_kv",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Case:
    """One request."""

    name: str
    category: str
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]


def main() -> None:
    """Print one table a format: a row a category."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="the folder `bfcl_eval/data` of the wheel")
    parser.add_argument("--formats", nargs="+", help="only these")
    parser.add_argument("--tokenizer", type=Path, help="a folder with InternLM2's tokenizer, for its own vocabulary")
    parser.add_argument("--every", type=int, default=1, help="take each n-th case only")
    options = parser.parse_args()
    cases = list(_cases(options.data))[:: options.every]
    for name in options.formats or format_names(options.tokenizer):
        asyncio.run(_run(name, options.tokenizer, cases))


async def _run(name: str, tokenizer: Path | None, cases: list[Case]) -> None:
    scores: dict[str, Score] = {}
    async with serving(name, tokenizer) as url, AsyncClient(url) as client:
        for number, case in enumerate(cases):
            score = scores.setdefault(case.category, Score())
            for choice in ("required", "auto") if case.tools else ("auto",):
                stream = number % 2 == (choice == "auto")
                body = {"messages": case.messages, "tools": case.tools, "tool_choice": choice, "max_tokens": MAX_TOKENS}
                reply = await ask(client, score, f"{case.name} {choice}", stream=stream, **body)
                if reply is not None:
                    judge_calls(score, f"{case.name} {choice}", reply, _schemas(case.tools))
    total = Score()
    print(f"\n{name}\n\n| category | {' | '.join(COLUMNS)} |\n|---|{'---|' * len(COLUMNS)}")
    for category, score in sorted(scores.items()):
        print(f"| {category} | {score.cells(COLUMNS)} |")
        total.counts += score.counts
        total.wrong += score.wrong
    print(f"| all | {total.cells(COLUMNS)} |", flush=True)
    for text in total.wrong[:20]:
        print(f"WRONG {text[:300]}")


def _schemas(tools: list[dict[str, Any]]) -> dict[str, Any]:
    functions = [tool["function"] for tool in normalize_tools(tools)]
    return {function["name"]: function["parameters"] for function in functions}


def _cases(data: Path) -> Iterator[Case]:
    for path in sorted(data.glob("BFCL_v4_*.json")):
        category = path.stem.removeprefix("BFCL_v4_")
        if category == "format_sensitivity":  # names of cases of other files
            continue
        for line in path.read_text("utf-8").splitlines():
            entry = json.loads(line)
            functions = entry["function"] if "function" in entry else list(_documented(data, entry))
            tools = [{"type": "function", "function": function} for function in functions]
            messages = next(turn for turn in entry["question"] if turn)
            yield Case(entry["id"], category, messages, tools)


def _documented(data: Path, entry: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for name in entry["involved_classes"]:
        text = (data / "multi_turn_func_doc" / f"{_DOCUMENTS[name]}.json").read_text("utf-8")
        for line in text.splitlines():
            function = json.loads(line)
            if function["name"] not in entry.get("excluded_function", ()):
                yield function


if __name__ == "__main__":
    main()
