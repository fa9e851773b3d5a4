"""Calls of a model that writes at random, of 200 varied schemas, in every tool format, streamed and not.

`python benchmarks/tool_schemas.py`. Each schema is the only tool's, asked for under tool_choice "required", by name,
and under "auto". The judge is `jsonschema`. Withheld are calls that broke a keyword which no grammar enforces.
"""

import argparse
import asyncio
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from random_replies import Score, ask, format_names, judge_calls, serving
from schema_samples import SLOPPY, WRITTEN, random_schema, tool

from lmdserve.clients.http import AsyncClient
from lmdserve.tools.schema import normalize_tools

MESSAGES = [{"role": "user", "content": "Hi"}]
MAX_TOKENS = 3000
COLUMNS = ("sent", "accepted", "calls", "valid", "cut", "withheld")
MODES: dict[str, Any] = {
    "required": "required",
    "named": {"type": "function", "function": {"name": "the_tool"}},
    "auto": "auto",
}


def main() -> None:
    """Print one table: a row a format and mode."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--schemas", type=int, default=200)
    parser.add_argument("--formats", nargs="+", help="only these")
    parser.add_argument("--tokenizer", type=Path, help="a folder with InternLM2's tokenizer, for its own vocabulary")
    options = parser.parse_args()
    schemas = list(_schemas(options.schemas))
    print(f"| format | tool_choice | {' | '.join(COLUMNS)} |\n|---|---|{'---|' * len(COLUMNS)}")
    for name in options.formats or format_names(options.tokenizer):
        asyncio.run(_run(name, options.tokenizer, schemas))


async def _run(name: str, tokenizer: Path | None, schemas: list[Any]) -> None:
    async with serving(name, tokenizer) as url, AsyncClient(url) as client:
        for mode, choice in MODES.items():
            for stream in (False, True):
                score = Score()
                for number, schema in enumerate(schemas):
                    tools = [tool("the_tool", schema)]
                    body = {"messages": MESSAGES, "tools": tools, "tool_choice": choice, "max_tokens": MAX_TOKENS}
                    reply = await ask(client, score, str(number), stream=stream, **body)
                    if reply is not None:
                        proper = normalize_tools(tools)[0]["function"]["parameters"]
                        judge_calls(score, f"schema {number}", reply, {"the_tool": proper})
                label = f"{mode}, streamed" if stream else mode
                print(f"| {name} | {label} | {score.cells(COLUMNS)} |", flush=True)
                for text in score.wrong[:20]:
                    print(f"WRONG {text[:300]}")


def _schemas(count: int) -> Iterator[Any]:
    """Yield the written ones, proper and sloppy, and as many random ones as are missing."""
    rng = random.Random(0)
    yield from (*WRITTEN, *SLOPPY)[:count]
    for _ in range(count - len(WRITTEN) - len(SLOPPY)):
        yield random_schema(rng)


if __name__ == "__main__":
    main()
