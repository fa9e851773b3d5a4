"""Hermes replies, hand-written and made up: every way they can arrive gives the calls that were put into them."""

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmdserve.tools.api import (
    ControlToken,
    Piece,
    ToolCallAborted,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
)
from lmdserve.tools.hermes import HermesFormat

MARKERS = ["<tool_call>", "</tool_call>", "<|im_end|>"]
F, G = ("f", {"x": 1}), ("g", {"y": [2, "z"]})
CALL_F = '{"name": "f", "arguments": {"x": 1}}'
CALL_G = '{"arguments": {"y": [2, "z"]}, "name": "g"}'

VECTORS: dict[str, tuple[str, str | None, list[Any]]] = {
    "no call": ("Just text.", "Just text.", []),
    "empty": ("", "", []),
    "as the template has it": (f"<tool_call>\n{CALL_F}\n</tool_call><|im_end|>", None, [F]),
    "on one line": (f"<tool_call>{CALL_F}</tool_call>", None, [F]),
    "two calls": (f"<tool_call>\n{CALL_F}\n</tool_call>\n<tool_call>\n{CALL_G}\n</tool_call><|im_end|>", None, [F, G]),
    "text before": (f"Let me see.\n\n<tool_call>\n{CALL_F}\n</tool_call>", "Let me see.\n", [F]),
    "text before, as the template has it": (f"Let me see.\n<tool_call>{CALL_F}</tool_call>", "Let me see.", [F]),
    "a newline last": ("Yes.\n<|im_end|>", "Yes.\n", []),
    "a newline before what is no call": ("Yes.\n<tool_call>no", "Yes.\n<tool_call>no", []),
    "text between": (f"<tool_call>{CALL_F}</tool_call> and <tool_call>{CALL_G}</tool_call>", " and ", [F, G]),
    "text after": (f"<tool_call>{CALL_F}</tool_call>\nDone.", "\nDone.", [F]),
    "the other key": ('<tool_call>{"name": "f", "parameters": {"x": 1}}</tool_call>', None, [F]),
    "no arguments": ('<tool_call>{"name": "f"}</tool_call>', None, [("f", {})]),
    "empty arguments": ('<tool_call>{"name": "f", "arguments": {}}</tool_call>', None, [("f", {})]),
    "a list in one tag": (f"<tool_call>[{CALL_F}, {CALL_G}]</tool_call>", None, [F, G]),
    "a fence": (f"<tool_call>\n```json\n{CALL_F}\n```\n</tool_call>", None, [F]),
    "no closing tag": (f"<tool_call>\n{CALL_F}<|im_end|>", None, [F]),
    "no end at all": (f"<tool_call>\n{CALL_F}", None, [F]),
    "opened again without closing": (f"<tool_call>{CALL_F}<tool_call>{CALL_G}</tool_call>", None, [F, G]),
    "nested braces and escapes": (
        '<tool_call>{"name": "f", "arguments": {"a": {"b": "}\\"{"}, "c": "\\u00e9\\n"}}</tool_call>',
        None,
        [("f", {"a": {"b": '}"{'}, "c": "é\n"})],
    ),
    "unicode": (
        '<tool_call>\n{"name": "天气", "arguments": {"城市": "上海 🙂"}}\n</tool_call>',
        None,
        [("天气", {"城市": "上海 🙂"})],
    ),
    "cut in the name": ('<tool_call>\n{"name": "f', '<tool_call>\n{"name": "f', []),
    "cut in the arguments": (
        'Hm. <tool_call>\n{"name": "f", "arguments": {"x": ',
        'Hm. <tool_call>\n{"name": "f", "arguments": {"x": ',
        [],
    ),
    "second call cut": (
        f'<tool_call>{CALL_F}</tool_call>\n<tool_call>{{"name": "g", "arg',
        '\n<tool_call>{"name": "g", "arg',
        [F],
    ),
    "not JSON": ("<tool_call>f(x=1)</tool_call>", "<tool_call>f(x=1)</tool_call>", []),
    "trailing comma": (
        '<tool_call>{"name": "f", "arguments": {"x": 1,}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"x": 1,}}</tool_call>',
        [],
    ),
    "arguments as text": (
        '<tool_call>{"name": "f", "arguments": "{}"}</tool_call>',
        '<tool_call>{"name": "f", "arguments": "{}"}</tool_call>',
        [],
    ),
    "words behind the call": (f"<tool_call>{CALL_F} ok</tool_call>!", " ok!", [F]),
    "nothing in the tags": ("a <tool_call></tool_call> b", "a <tool_call></tool_call> b", []),
    "a lone closing tag": ("a</tool_call>b", "a</tool_call>b", []),
}


@pytest.mark.parametrize("name", VECTORS)
def test_replies(check_vector, name):
    reply, content, calls = VECTORS[name]
    check_vector(HermesFormat(), reply, (content, calls), MARKERS)


def test_tags_are_text_where_the_model_has_tokens_for_them(result_of):
    parser = HermesFormat().make_parser()
    reply = f"Write <tool_call>{CALL_F}</tool_call> to call."
    assert result_of([*parser.feed(reply), *parser.finish()]) == (reply, [])


def test_a_spelled_tag_inside_the_arguments_is_text(result_of):
    arguments = {"x": "</tool_call><tool_call>"}
    reply = "<tool_call>" + json.dumps({"name": "f", "arguments": arguments}) + "</tool_call>"
    for pieces in ([reply], list(reply)):
        parser = HermesFormat().make_parser(match_text=True)
        events = [event for piece in pieces for event in parser.feed(piece)]
        assert result_of(events + parser.finish()) == (None, [("f", arguments)])


def test_tags_are_read_by_spelling_where_the_model_has_no_tokens_for_them(result_of):
    tool_format = HermesFormat.for_tokens({"<|im_end|>", "<s>"}, chat_template=None)
    assert tool_format.call_openers == frozenset()
    parser = tool_format.make_parser()
    assert result_of([*parser.feed(f"<tool_call>{CALL_F}</tool_call>"), *parser.finish()]) == (None, [F])


def test_arguments_stream_while_they_are_generated():
    parser = HermesFormat().make_parser()
    opener = ControlToken("<tool_call>", 1000)
    assert parser.feed(opener) == []
    assert parser.feed('\n{"name": "f", "arguments": ') == []
    start, first = parser.feed('{"x": ')
    assert isinstance(start, ToolCallStart)
    assert (start.index, start.name) == (0, "f")
    assert first == ToolCallArguments(0, '{"x": ')
    assert parser.feed("12") == [ToolCallArguments(0, "12")]
    assert parser.feed("}") == [ToolCallArguments(0, "}")]
    assert parser.feed("}") == [ToolCallEnd(0)]
    assert parser.finish() == []


def test_a_call_that_breaks_off_is_taken_back():
    parser = HermesFormat().make_parser()
    parser.feed(ControlToken("<tool_call>", 1000))
    parser.feed('{"name": "f", "arguments": {"x"')
    assert parser.finish() == [ToolCallAborted(0, '<tool_call>{"name": "f", "arguments": {"x"')]


# --- replies made of known parts ---

words = st.text(alphabet="ab {}[]\"'<>/\n\\,:é中", max_size=12)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-99, 99) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
calls = st.tuples(st.text(min_size=1, max_size=8), st.dictionaries(st.text(max_size=5), json_values, max_size=3))


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_what_was_put_in_comes_out(result_of, data):
    """Texts between calls may be anything; the parser may only drop whitespace that stands alone around calls."""
    parts = data.draw(st.lists(words.filter(lambda text: text.strip()) | calls, max_size=5))
    pieces: list[Piece] = []
    for part in parts:
        if isinstance(part, str):
            pieces += _cut(data, part)
        else:
            body = json.dumps({"name": part[0], "arguments": part[1]}, ensure_ascii=data.draw(st.booleans()))
            pieces += [
                ControlToken("<tool_call>", 1000),
                *_cut(data, f"\n{body}\n"),
                ControlToken("</tool_call>", 1001),
            ]
    parser = HermesFormat().make_parser()
    content, found = result_of([event for piece in pieces for event in parser.feed(piece)] + parser.finish())
    assert found == [part for part in parts if not isinstance(part, str)]
    expected = "".join(part for part in parts if isinstance(part, str))
    assert "".join((content or "").split()) == "".join(expected.split())


def _cut(data: st.DataObject, text: str) -> list[str]:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=4)))
    return [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
