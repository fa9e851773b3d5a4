"""Replies made to be expensive: every parser takes them character by character in time linear in their length."""

import time
from collections.abc import Callable

import pytest

from lmdserve.tools.api import ControlToken, ToolFormat, ToolParser
from lmdserve.tools.hermes import HermesFormat
from lmdserve.tools.internlm2 import InternLM2Format
from lmdserve.tools.llama import LlamaFormat
from lmdserve.tools.mistral import MistralFormat
from lmdserve.tools.reasoning import ReasoningFormat

NUM_CHARS = 200_000
MAX_S = 20.0  # takes 1 s; quadratic work on this many characters takes minutes
OPENERS = {
    "hermes": (HermesFormat(), ["<tool_call>"]),
    "internlm2": (InternLM2Format(), ["<|action_start|>", "<|plugin|>"]),
    "llama": (LlamaFormat(), []),
    "llama, tag": (LlamaFormat(), ["<|python_tag|>"]),
    "mistral": (MistralFormat(), ["[TOOL_CALLS]"]),
}
BODIES = {
    "whitespace": " ",
    "newlines": "a\n\n",
    "a name": "a",
    "braces": "{",
    "brackets": "[",
    "backticks": "`",
    "a key": '{"a',
    "arguments without a name": '{"arguments": {"x": "',
    "a built-in call": "a.call(x='",
}


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("name", OPENERS)
def test_time_is_linear(name: str, body: str) -> None:
    tool_format, openers = OPENERS[name]
    check(tool_format.make_parser, openers, BODIES[body])


@pytest.mark.parametrize("body", ["whitespace", "newlines", "a name"])
def test_time_of_reasoning_is_linear(body: str) -> None:
    check(lambda: ReasoningFormat(frozenset()).make_parser(None, is_open=True), [], BODIES[body])
    check(lambda: ReasoningFormat(frozenset()).make_parser(None, is_open=False), [], BODIES[body])


def check(make_parser: Callable[[], ToolParser], openers: list[str], body: str) -> None:
    parser = make_parser()
    text = body[:-1] + body[-1] * NUM_CHARS if len(set(body)) > 2 else body * (NUM_CHARS // len(body))
    started_s = time.perf_counter()
    for opener in openers:
        parser.feed(ControlToken(opener, 1))
    for character in text:
        parser.feed(character)
    parser.finish()
    assert time.perf_counter() - started_s < MAX_S


def test_all_formats_are_here() -> None:
    formats: set[ToolFormat] = {tool_format for tool_format, _ in OPENERS.values()}
    assert {tool_format.name for tool_format in formats} == {"hermes", "internlm2", "llama3", "mistral"}
