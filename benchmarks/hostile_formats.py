"""Requests that mean harm to grammars, sent to a running server: how long they take, and what other streams notice.

`python benchmarks/hostile_formats.py [--model demo] [--server OPTION...]` starts a server. While streams run, requests
of each kind are sent one after the other for a few seconds; a gap is the time between two events of a stream.
"""

import argparse
import asyncio
import itertools
import json
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import aiohttp

STREAM = {
    "messages": [{"role": "user", "content": "Tell me a long story."}],
    "stream": True,
    "ignore_eos": True,
    "max_tokens": 400,
}
SILENCE_LIMIT_S = 120.0
NUM_BODIES = 40  # different ones of a kind
Kind = tuple[str, Callable[[int], dict[str, Any]]]


def main() -> None:
    """Print one table: a row a kind of request."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=5.0, help="for each kind of request")
    parser.add_argument("--kinds", help="only these, separated by semicolons")
    parser.add_argument("--server", nargs=argparse.REMAINDER, default=[], help="more options for the server")
    options = parser.parse_args()
    command = [sys.executable, "-m", "lmdserve", "--model", options.model, "--server-port", "0", *options.server]
    process = subprocess.Popen([*command, "--log-level", "ERROR"], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        url = next(found.group() for line in process.stdout if (found := re.search(r"http://\S+?:\d+", line)))
        names = None if options.kinds is None else options.kinds.split(";")
        kinds = [(name, make) for name, make in _kinds() if names is None or name in names]
        asyncio.run(_run(url, kinds, options.streams, options.seconds))
    finally:
        process.terminate()
        process.wait()


async def _run(url: str, kinds: Sequence[Kind], num_streams: int, seconds: float) -> None:
    print(
        "| request | sent | statuses | longest, ms | gap p50, ms | p99 | max |\n|---|---|---|---|---|---|---|",
        flush=True,
    )
    timeout = aiohttp.ClientTimeout(total=None, sock_read=SILENCE_LIMIT_S)
    async with aiohttp.ClientSession(url, timeout=timeout) as session:
        streams = Streams(session)
        tasks = [asyncio.create_task(streams.follow()) for _ in range(num_streams)]
        await asyncio.sleep(2.0)
        for name, make in [("none", None), *kinds, ("none, again", None)]:
            bodies = [] if make is None else [_body(make(number)) for number in range(NUM_BODIES)]
            await asyncio.sleep(0.5)  # what the last kind began is over
            streams.gaps_s.clear()
            statuses: Counter[int] = Counter()
            longest_s = 0.0
            end_s = time.perf_counter() + seconds
            for number in itertools.count():
                begun_s = time.perf_counter()
                if begun_s > end_s:
                    break
                if not bodies:
                    await asyncio.sleep(seconds)
                    continue
                statuses[await _post(session, bodies[number % NUM_BODIES])] += 1
                longest_s = max(longest_s, time.perf_counter() - begun_s)
            said = ", ".join(f"{status}: {count}" for status, count in statuses.items())
            cells = " | ".join(f"{gap_s * 1e3:.1f}" for gap_s in _percentiles(streams.gaps_s))
            print(f"| {name} | {statuses.total()} | {said} | {longest_s * 1e3:.0f} | {cells} |", flush=True)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Streams:
    """The streams that nobody should be able to disturb; they begin anew as they end."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session
        self.gaps_s: list[float] = []

    async def follow(self) -> None:
        """Read one answer after the other."""
        while True:
            async with self._session.post("/v1/chat/completions", json=STREAM) as reply:
                assert reply.status == 200, await reply.text()
                before_s: float | None = None
                async for _ in reply.content.iter_any():
                    now_s = time.perf_counter()
                    if before_s is not None:
                        self.gaps_s.append(now_s - before_s)
                    before_s = now_s


async def _post(session: aiohttp.ClientSession, body: bytes) -> int:
    headers = {"Content-Type": "application/json"}
    async with session.post("/v1/chat/completions", data=body, headers=headers) as reply:
        await reply.read()
        return reply.status


def _body(fields: dict[str, Any]) -> bytes:
    messages = [{"role": "user", "content": "Hi"}]
    return json.dumps({"messages": messages, "max_tokens": 40, **fields}).encode()


def _percentiles(values: Sequence[float]) -> tuple[float, float, float]:
    in_order = sorted(values)
    return in_order[len(in_order) // 2], in_order[int(len(in_order) * 0.99)], in_order[-1]


def _kinds() -> Iterator[Kind]:
    """Yield each kind of request, as the fields of the n-th one: none has been compiled before."""
    city = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 8}}, "additionalProperties": False}
    yield "no format", lambda n: {"seed": n}
    yield "choices of three, twelve at once", lambda n: {"guided_json": _exponential(12, n)}
    yield "an enum of 0.5 MB", lambda n: {"guided_json": {"enum": [f"{i}{n}" + "x" * 45 for i in range(9_000)]}}
    yield "a schema of 1 MB", lambda n: {"guided_json": {"enum": [f"{i}{n}" + "x" * 95 for i in range(9_500)]}}
    yield "2,000 properties", lambda n: {"guided_json": {"properties": {f"p{i}_{n}": city for i in range(2_000)}}}
    yield "60 levels", lambda n: {"guided_json": _nested(60, n)}
    yield "90 levels", lambda n: {"guided_json": _nested(90, n)}
    yield "a contradiction", lambda n: {"guided_json": {"type": "integer", "minimum": n + 2, "maximum": n}}
    yield "regex (a+)+b", lambda n: {"regex": f"(a+)+b|{n}"}
    yield "regex [a-z]*a.{100}", lambda n: {"regex": f"[a-z]*a.{{100}}{n}"}
    yield "regex (x{1000}){1000}", lambda n: {"regex": f"(x{{1000}}){{1000}}{n}"}
    yield "regex of nested counts", lambda n: {"regex": f"((a{{0,60}}b?){{0,60}}c?){{0,40}}{n}"}
    yield "128 tools", lambda n: {"tools": [_tool(f"f{i}_{n}", city) for i in range(128)], "tool_choice": "required"}
    yield "128 tools of 81 cases each", lambda n: {"tools": [_tool(f"f{i}", _exponential(4, n)) for i in range(128)]}
    yield "tools of 1 MB", lambda n: {"tools": [_tool(f"f{n}", {"properties": {f"p{i}": city for i in range(8_000)}})]}
    yield "empty lists of 3 MB", lambda n: {"metadata": [[]] * 1_000_000, "seed": n}
    yield "64 costly choices", lambda n: {"regex": f"[a-z ]*a[a-z ]{{40}}{n}", "n": 64}
    yield "a check of 2^60 steps", lambda n: {"guided_json": _slow_check(n), "max_tokens": 400}
    yield "3,000 brackets", lambda n: {"grammar": "start: " + "(" * 3000 + f'"a{n}"' + ")" * 3000}


def _exponential(count: int, number: int) -> dict[str, Any]:
    return {
        "allOf": [
            {"anyOf": [{"properties": {f"{i}{j}": {"const": number}}, "required": [f"{i}{j}"]} for j in range(3)]}
            for i in range(count)
        ]
    }


def _nested(depth: int, number: int) -> dict[str, Any]:
    return {"const": number} if depth == 0 else {"type": "array", "items": _nested(depth - 1, number)}


def _slow_check(number: int) -> dict[str, Any]:
    """A schema that no value obeys, which a checker takes 2^60 steps to say of an array."""
    twice = {f"a{i}": {"anyOf": [{"$ref": f"#/$defs/a{i + 1}"}] * 2} for i in range(60)}
    last = {"type": "array", "uniqueItems": True, "minItems": 2, "maxItems": 2, "items": {"enum": [number]}}
    return {"$ref": "#/$defs/a0", "$defs": {**twice, "a60": last}}


def _tool(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object", **schema}}}


if __name__ == "__main__":
    main()
