"""Reasoning blocks alone and in front of tool calls: every way a reply can arrive gives the same parts."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmdserve.tools.api import ContentDelta, ControlToken, Piece, ReasoningDelta, fold
from lmdserve.tools.hermes import HermesFormat
from lmdserve.tools.llama import LlamaFormat
from lmdserve.tools.reasoning import ReasoningFormat, reasoning_format_for

TAGS = ("<think>", "</think>")
CALL = '<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>'
F = ("f", '{"x": 1}')


class Vector(NamedTuple):
    reply: str
    reasoning: str | None
    content: str | None
    calls: list[Any] = []  # noqa: RUF012  # never changed
    is_open: bool = False


VECTORS = {
    "none": Vector("Hello.", None, "Hello."),
    "empty reply": Vector("", None, ""),
    "whitespace": Vector(" \n", None, " \n"),
    "leading whitespace of an answer": Vector("\n Hello.", None, "\n Hello."),
    "a block": Vector("<think>\nHm, 2.\n</think>\n\nIt is 2.", "Hm, 2.", "It is 2."),
    "whitespace before the block": Vector("\n<think>Hm</think>It is.", "Hm", "It is."),
    "whitespace inside": Vector("<think>\n\n a \n\n b \n</think>\n\n c \n", "a \n\n b", "c \n"),
    "an empty block": Vector("<think>\n\n</think>\n\nYes.", None, "Yes."),
    "nothing behind the block": Vector("<think>a</think>\n", "a", ""),
    "not closed": Vector("<think>\nFirst, I", "First, I", ""),
    "opened by the prompt": Vector("Hm.\n</think>\n\nYes.", "Hm.", "Yes.", is_open=True),
    "opened by the prompt and not closed": Vector(" Hm. ", "Hm.", "", is_open=True),
    "opened by the prompt and again": Vector("a<think>b</think>c", "a<think>b", "c", is_open=True),
    "a tag in the answer": Vector("Write <think>x</think>.", None, "Write <think>x</think>."),
    "a second block": Vector("<think>a</think>b<think>c</think>d", "a", "b<think>c</think>d"),
    "only a closing tag": Vector("a</think>b", None, "a</think>b"),
    "a call behind": Vector(f"<think>\nCall f.\n</think>\n\n{CALL}", "Call f.", None, [F]),
    "text and a call behind": Vector(f"<think>a</think>\n\nb\n{CALL}", "a", "b", [F]),
    "a call and no block": Vector(CALL, None, None, [F]),
    "a call before the block is closed": Vector(f"<think>a {CALL}</think>b", "a", "b", [F]),
    "a call and never closed": Vector(f"a\n{CALL}", "a", None, [F], is_open=True),
    "a closing tag of a call in the block": Vector("<think>a</tool_call>b</think>c", "a</tool_call>b", "c"),
}  # fmt: skip


def run(pieces: Iterable[Piece], vector: Vector, *, tag_tokens: Iterable[str]) -> tuple[Any, ...]:
    tool_format = HermesFormat()
    parser = ReasoningFormat(frozenset(tag_tokens)).make_parser(
        tool_format.make_parser(), is_open=vector.is_open, call_openers=tool_format.call_openers
    )
    folded = fold([event for piece in pieces for event in parser.feed(piece)] + parser.finish())
    return folded.reasoning, folded.content, [(call.name, call.arguments) for call in folded.tool_calls]


def pieces_of(reply: str, tokens: Iterable[str]) -> list[Piece]:
    """Return the reply's text, with the spellings of some tokens as tokens."""
    pieces: list[Piece] = [reply]
    for token in tokens:
        pieces = [part for piece in pieces for part in _split_at(piece, token)]
    return pieces


def _split_at(piece: Piece, token: str) -> list[Piece]:
    if isinstance(piece, ControlToken):
        return [piece]
    first, *others = piece.split(token)
    found: list[Piece] = [first]
    for text in others:
        found += [ControlToken(token, 7), text]
    return [part for part in found if part]


def every_way(pieces: list[Piece]) -> Iterable[list[Piece]]:
    yield pieces
    yield [c for piece in pieces for c in ([piece] if isinstance(piece, ControlToken) else piece)]
    for position, piece in enumerate(pieces):
        for cut in range(1, 0 if isinstance(piece, ControlToken) else len(piece)):
            yield [*pieces[:position], piece[:cut], piece[cut:], *pieces[position + 1 :]]


@pytest.mark.parametrize("tag_tokens", [TAGS, ()], ids=["tags by id", "tags spelled"])
@pytest.mark.parametrize("name", VECTORS)
def test_replies(name, tag_tokens):
    vector = VECTORS[name]
    for pieces in every_way(pieces_of(vector.reply, ["<tool_call>", "</tool_call>", *tag_tokens])):
        assert run(pieces, vector, tag_tokens=tag_tokens) == vector[1:4], pieces


@settings(max_examples=300, deadline=None)
@given(
    parts=st.lists(st.sampled_from([*TAGS, "<tool_call>", "<", "think", " ", "\n", "a", '{"name": "f"}']), max_size=10),
    is_open=st.booleans(),
    tag_tokens=st.sampled_from([TAGS, ()]),
)
def test_no_split_changes_anything_and_nothing_is_lost(parts, is_open, tag_tokens):
    reply = "".join(parts)
    vector = Vector(reply, None, None, is_open=is_open)
    whole, *others = every_way(pieces_of(reply, ["<tool_call>", *tag_tokens]))
    reasoning, content, calls = expected = run(whole, vector, tag_tokens=tag_tokens)
    assert all(run(pieces, vector, tag_tokens=tag_tokens) == expected for pieces in others)
    if not calls:
        assert without_tags_and_spaces(f"{reasoning or ''}{content}") == without_tags_and_spaces(reply)


def without_tags_and_spaces(text: str) -> str:
    return "".join(text.replace("<think>", "").replace("</think>", "").split())


def test_spelled_tags_are_text_where_they_are_tokens():
    vector = Vector("<think>a</think>b", None, "<think>a</think>b")
    assert run([vector.reply], vector, tag_tokens=TAGS) == vector[1:4]


def test_without_tools():
    parser = ReasoningFormat().make_parser(None, is_open=True)
    assert parser.feed("I ") == [ReasoningDelta("I")]
    assert parser.feed("see") == [ReasoningDelta(" see")]
    assert parser.feed(ControlToken("</think>", 9)) == []
    assert parser.feed("\n\nYes") == [ContentDelta("Yes")]
    assert parser.finish() == []


def test_a_reply_that_is_a_call_by_its_first_character_may_have_reasoning_before_it():
    parser = ReasoningFormat().make_parser(LlamaFormat().make_parser(), is_open=True)
    pieces = ["Hm.", ControlToken("</think>", 9), '\n\n{"name": "f", "parameters": {}}']
    folded = fold([event for piece in pieces for event in parser.feed(piece)] + parser.finish())
    assert (folded.reasoning, folded.content, len(folded.tool_calls)) == ("Hm.", None, 1)


@pytest.mark.parametrize(
    ("template", "tokens", "expected"),
    [
        (None, TAGS, None),
        ("{{ messages[0].content }}", TAGS, None),
        ("{{ '<think>\n' }}{{ content.split('</think>')[-1] }}", TAGS, frozenset(TAGS)),
        ("{{ content.split('</think>')[-1] }}", ["<s>"], frozenset()),
    ],
)
def test_the_template_tells_whether_a_model_reasons(template, tokens, expected):
    found = reasoning_format_for(template, tokens)
    assert (None if found is None else found.control_tokens) == expected
