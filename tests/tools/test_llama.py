"""Llama 3.1 replies, hand-written: every way they can arrive gives the same calls, and JSON answers stay answers."""

from typing import Any

import pytest

from lmdserve.tools.api import ControlToken, ToolCallAborted, ToolCallArguments, ToolCallStart
from lmdserve.tools.llama import LlamaFormat

MARKERS = ["<|python_tag|>", "<|eom_id|>", "<|eot_id|>"]
TOOLS = frozenset({"f", "g", "brave_search", "code_interpreter"})
F, G = ("f", {"x": 1}), ("g", {"y": [2, "z"]})
CALL_F = '{"name": "f", "parameters": {"x": 1}}'
CALL_G = '{"name": "g", "arguments": {"y": [2, "z"]}}'


def code(text: str) -> tuple[str, dict[str, str]]:
    return "code_interpreter", {"code": text}


VECTORS: dict[str, tuple[str, str | None, list[Any]]] = {
    "no call": ("Just text.<|eot_id|>", "Just text.", []),
    "empty": ("", "", []),
    "whitespace": (" \n", " \n", []),
    "as the template has it": (f"{CALL_F}<|eot_id|>", None, [F]),
    "whitespace around": (f"\n\n {CALL_F} \n<|eot_id|>", None, [F]),
    "type in front": ('{"type": "function", "name": "f", "parameters": {"x": 1}}', None, [F]),
    "name last": ('{"parameters": {"x": 1}, "name": "f"}', None, [F]),
    "no parameters": ('{"name": "f"}', None, [("f", {})]),
    "two calls": (f"{CALL_F}; {CALL_G}<|eot_id|>", None, [F, G]),
    "two calls, two lines": (f"{CALL_F}\n{CALL_G}", None, [F, G]),
    "a list": (f"[{CALL_F}, {CALL_G}]<|eom_id|>", None, [F, G]),
    "behind the tag": (f"<|python_tag|>{CALL_F}<|eom_id|>", None, [F]),
    "two behind the tag": (f"<|python_tag|>{CALL_F}; {CALL_G}<|eom_id|>", None, [F, G]),
    "text, then the tag": (f"Wait.<|python_tag|>{CALL_F}<|eom_id|>", "Wait.", [F]),
    "built in": (
        '<|python_tag|>brave_search.call(query="weather in Oslo")<|eom_id|>',
        None,
        [("brave_search", {"query": "weather in Oslo"})],
    ),
    "built in, other literals": (
        "<|python_tag|>brave_search.call(query='it\\'s', n=-2, deep=True, sites=[\"a\", (1.5, None)])<|eom_id|>",
        None,
        [("brave_search", {"query": "it's", "n": -2, "deep": True, "sites": ["a", [1.5, None]]})],
    ),
    "built in, no end of turn": (
        '<|python_tag|>brave_search.call(query="a")',
        None,
        [("brave_search", {"query": "a"})],
    ),
    "built in, not offered": (
        '<|python_tag|>wolfram_alpha.call(query="1+1")<|eom_id|>',
        None,
        [code('wolfram_alpha.call(query="1+1")')],
    ),
    "code": ("<|python_tag|>print(1)\nprint(2)<|eom_id|>", None, [code("print(1)\nprint(2)")]),
    "code that looks built in": ("<|python_tag|>x.call(1, 2)<|eom_id|>", None, [code("x.call(1, 2)")]),
    "code with a name": ("<|python_tag|>brave = 1<|eom_id|>", None, [code("brave = 1")]),
    "code that begins with a dict": ('<|python_tag|>{"a": 1}["a"]<|eom_id|>', None, [code('{"a": 1}["a"]')]),
    "code that begins with a list": ("<|python_tag|>[i for i in x]<|eom_id|>", None, [code("[i for i in x]")]),
    "code cut off": ("<|python_tag|>print(1", "<|python_tag|>print(1", []),
    "built in, cut off": (
        '<|python_tag|>brave_search.call(query="a',
        '<|python_tag|>brave_search.call(query="a',
        [],
    ),
    "an answer in JSON": ('{"answer": 42}<|eot_id|>', '{"answer": 42}', []),
    "an answer with a name": ('{"name": "Ann", "age": 3}', '{"name": "Ann", "age": 3}', []),
    "an answer with the name of a tool": ('{"name": "f", "age": 3}', '{"name": "f", "age": 3}', []),
    "an answer that is a list": ("[1, 2]", "[1, 2]", []),
    "an unknown tool": ('{"name": "h", "parameters": {}}', '{"name": "h", "parameters": {}}', []),
    "a call behind text": (f"I call {CALL_F}", f"I call {CALL_F}", []),
    "a fence": (f"```json\n{CALL_F}\n```", f"```json\n{CALL_F}\n```", []),
    "text behind the call": (f"{CALL_F} ok?", " ok?", [F]),
    "cut off": ('{"name": "f", "parameters": {"x": ', '{"name": "f", "parameters": {"x": ', []),
    "second call cut off": (f'{CALL_F}; {{"name": "g", ', '; {"name": "g", ', [F]),
    "second call unknown": (f'{CALL_F}; {{"name": "h"}}', '; {"name": "h"}', [F]),
}


@pytest.mark.parametrize("name", VECTORS)
def test_replies(check_vector, name):
    reply, content, calls = VECTORS[name]
    check_vector(LlamaFormat(), reply, (content, calls), MARKERS, TOOLS)


@pytest.mark.parametrize(
    "reply", ["<|python_tag|>print(1)<|eom_id|>", '<|python_tag|>brave_search.call(query="a")<|eom_id|>']
)
def test_what_was_not_offered_is_content(check_vector, reply):
    check_vector(LlamaFormat(), reply, (reply.removesuffix("<|eom_id|>"), []), MARKERS, {"f"})


@pytest.mark.parametrize("name", ["f", "anything"])
def test_any_name_is_a_call_where_it_is_unknown_what_was_offered(check_vector, name):
    check_vector(LlamaFormat(), f'{{"name": "{name}", "parameters": {{}}}}', (None, [(name, {})]), MARKERS)


@pytest.mark.parametrize(
    "text",
    ["name.call(a=__import__('os'))", "name.call(a=1, a=2)", "name.call(**{})", "name.call(a=1e999)",
     "name.call(a={1})", "name.call(a=b'x')", "name.call(a='\\ud800')", "name.call(a=" + "[" * 500 + "]" * 500 + ")",
     "name.call(a=1); f()"],
)  # fmt: skip
def test_what_is_no_literal_is_never_evaluated_to_a_call(text):
    parser = LlamaFormat().make_parser(tool_names={"name"})
    pieces = [ControlToken("<|python_tag|>", 1), text, ControlToken("<|eom_id|>", 2)]
    events = [event for piece in pieces for event in parser.feed(piece)] + parser.finish()
    assert not any(isinstance(event, ToolCallStart) for event in events)
    assert "".join(event.text for event in events) == "<|python_tag|>" + text


def test_arguments_stream_without_any_marker():
    parser = LlamaFormat().make_parser(tool_names=TOOLS)
    assert parser.feed('{"name": "f", "parameters"') == []
    start, arguments = parser.feed(': {"x": ')
    assert (start.name, arguments) == ("f", ToolCallArguments(0, '{"x": '))
    assert parser.feed("1") == [ToolCallArguments(0, "1")]
    assert parser.finish() == [ToolCallAborted(0, '{"name": "f", "parameters": {"x": 1')]


def test_an_answer_in_json_is_held_no_longer_than_its_first_odd_key():
    parser = LlamaFormat().make_parser(tool_names=TOOLS)
    assert parser.feed('{"answer"') == []
    assert [event.text for event in parser.feed(": 4")] == ['{"answer": ', "4"]


def test_code_streams():
    parser = LlamaFormat().make_parser(tool_names=TOOLS)
    parser.feed(ControlToken("<|python_tag|>", 1))
    assert parser.feed("bra") == []
    start, *rest = parser.feed("ce = 1\nx")
    assert start.name == "code_interpreter"
    assert "".join(event.fragment for event in rest) == '{"code": "brace = 1\\nx'


def test_the_interpreter_is_a_built_in_tool():
    f = {"type": "function", "function": {"name": "f"}}
    interpreter = {"type": "code_interpreter"}
    assert LlamaFormat().template_variables([f]) == {"tools": [f]}
    assert LlamaFormat().template_variables([f, interpreter]) == {"tools": [f], "builtin_tools": ["code_interpreter"]}
    assert LlamaFormat().template_variables([interpreter]) == {"tools": None, "builtin_tools": ["code_interpreter"]}
