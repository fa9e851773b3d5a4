"""The contract of parsers: control tokens, folding, call ids."""

import re

from lmdserve.tools.api import (
    ContentDelta,
    ControlToken,
    Folded,
    ToolCall,
    ToolCallAborted,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
    fold,
    new_call_id,
)


def test_a_control_token_is_its_text_and_knows_its_id():
    token = ControlToken("<|im_end|>", 92542)
    assert token == "<|im_end|>"
    assert token.token_id == 92542
    assert isinstance("a" + token, str)
    assert not isinstance("a" + token, ControlToken)


def test_fold_joins_content_and_arguments():
    events = [
        ContentDelta("Let me "),
        ContentDelta("see."),
        ToolCallStart(0, "call_a", "f"),
        ToolCallArguments(0, '{"x"'),
        ToolCallArguments(0, ": 1}"),
        ToolCallEnd(0),
        ToolCallStart(1, "call_b", "g"),
        ToolCallArguments(1, "{}"),
        ToolCallEnd(1),
        ContentDelta(" Done."),
    ]
    calls = [ToolCall("call_a", "f", '{"x": 1}'), ToolCall("call_b", "g", "{}")]
    assert fold(events) == Folded("Let me see. Done.", calls)


def test_fold_puts_the_text_of_an_aborted_call_where_it_stood():
    events = [
        ContentDelta("a "),
        ToolCallStart(0, "call_a", "f"),
        ToolCallArguments(0, "{"),
        ToolCallAborted(0, "<raw>"),
        ContentDelta(" b"),
    ]
    assert fold(events) == Folded("a <raw> b", [])


def test_content_is_none_only_beside_calls():
    call = [ToolCallStart(0, "call_a", "f"), ToolCallArguments(0, "{}"), ToolCallEnd(0)]
    assert fold([]) == Folded("", [])
    assert fold(call).content is None


def test_call_ids_are_url_safe_and_unique():
    ids = {new_call_id() for _ in range(1000)}
    assert len(ids) == 1000
    assert all(re.fullmatch(r"call_[A-Za-z0-9_-]{24}", call_id) for call_id in ids)
