"""Servers for benchmarks whose model writes at random, one of every tool format: what they say is what grammars allow.

The model is the tests' stand-in for random weights at temperature 1; all else (HTTP, rendering, grammars, parsing) is
the real server. The vocabularies are bytes, or a given InternLM2 tokenizer's own 92,544 tokens.
"""

import json
import logging
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import jsonschema

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "server"))

from sampling_engine import FAVOURITES, SamplingEngine
from server_fakes import running
from toy_models import TOY_MODELS

from lmdserve.clients.http import AsyncClient
from lmdserve.clients.wire import ChatReply, ReplyBuilder, ServerError
from lmdserve.server.model import ServedModel, load_served_model

REAL = "internlm2, 92,544 tokens"
_CONTROL = ("<|action_start|>", "<|action_end|>", "<|plugin|>", "<|interpreter|>", "<|im_end|>", "</s>")
_END = "<|im_end|>"


@asynccontextmanager
async def serving(name: str, tokenizer_folder: Path | None) -> AsyncIterator[str]:
    """Serve the toy model of this name, or InternLM2's own vocabulary under `REAL`; gives the URL."""
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if name == REAL:
            assert tokenizer_folder is not None
            model, engine = open_internlm2(tokenizer_folder)
        else:
            toy = TOY_MODELS[name]
            model = _load(toy.write(folder))
            opener = b"<tool_call>" if name == "hermes, spelled" else b""
            engine = SamplingEngine(model.tokenizer.vocab_size, toy.ids(toy.turn_end), opener=opener)
        async with running(engine, model) as url:
            yield url


def format_names(tokenizer_folder: Path | None) -> list[str]:
    """Return what can be served."""
    return [*TOY_MODELS, *([REAL] if tokenizer_folder is not None else [])]


def open_internlm2(folder: Path) -> tuple[ServedModel, SamplingEngine]:
    """Return InternLM2's text side and an engine that draws from its vocabulary."""
    model = _load(folder)
    tokenizer = model.tokenizer
    control = tokenizer.control_tokens
    single = [
        i for i in range(tokenizer.vocab_size) if len(data := tokenizer.token_bytes(i)) == 1 and data[0] in FAVOURITES
    ]
    engine = SamplingEngine(
        tokenizer.vocab_size,
        [control[_END]],
        favourites=single,
        control_ids=[control[text] for text in _CONTROL],
    )
    return model, engine


def _load(folder: Path) -> ServedModel:
    return load_served_model(folder, name="random", chat_template=None)


class Score:
    """Counts what came back, and keeps what was wrong."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []

    def cells(self, names: Sequence[str]) -> str:
        """Return these counts as cells of a table."""
        return " | ".join(str(self.counts[name]) for name in names)


async def ask(client: AsyncClient, score: Score, case: str, *, stream: bool, **body: Any) -> ChatReply | None:
    """Send one request and count it: sent, accepted or refused, and whether its answer broke what it had to obey."""
    score.counts["sent"] += 1
    try:
        reply = await (_streamed(client, **body) if stream else client.chat(**body))
    except ServerError as error:
        if error.code == "invalid_output":
            score.counts["accepted"] += 1
            score.counts["withheld"] += 1
        else:
            score.counts["refused"] += 1
            score.wrong.append(f"{case}: {error}")
        return None
    score.counts["accepted"] += 1
    score.counts["cut"] += reply.finish_reason == "length"
    return reply


async def _streamed(client: AsyncClient, messages: Sequence[Mapping[str, Any]], **params: Any) -> ChatReply:
    builder = ReplyBuilder()
    async with aclosing(client.stream_chat(messages, **params)) as deltas:
        async for delta in deltas:
            builder.add(delta)
    return builder.reply()


def judge_calls(score: Score, case: str, reply: ChatReply, schemas: Mapping[str, Any]) -> None:
    """Count the reply's calls and those that parse and validate, by `jsonschema`, against the schema of their tool."""
    calls = reply.message.get("tool_calls") or []
    if reply.finish_reason == "length" and calls and not _is_json(calls[-1]["function"]["arguments"]):
        calls = calls[:-1]  # cut by max_tokens while it was streamed, and said so
    expected = "tool_calls" if calls else "stop"
    if reply.finish_reason not in ("length", expected):
        score.wrong.append(f"{case}: finish_reason {reply.finish_reason} with {len(calls)} calls")
    for call in calls:
        score.counts["calls"] += 1
        try:
            schema = schemas[call["function"]["name"]]
            jsonschema.Draft202012Validator(schema).validate(json.loads(call["function"]["arguments"]))
            score.counts["valid"] += 1
        except (KeyError, ValueError, jsonschema.ValidationError) as error:
            score.wrong.append(f"{case}: {call['function']}: {str(error).splitlines()[0]}")


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True
