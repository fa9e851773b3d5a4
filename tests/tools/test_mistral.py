"""Mistral replies in both forms, hand-written: every way they can arrive gives the same calls, with ids of nine."""

import re
from typing import Any

import pytest

from lmdserve.tools.api import (
    ControlToken,
    ToolCallAborted,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
    fold,
)
from lmdserve.tools.mistral import MistralFormat

MARKERS = ["[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "</s>"]
F, G = ("f", {"x": 1}), ("g-2.b", {"y": [2, "z"]})
CALL_F = '{"name": "f", "arguments": {"x": 1}, "id": "abcdefgh1"}'
CALL_G = '{"name": "g-2.b", "arguments": {"y": [2, "z"]}}'
ARGS_G = '{"y": [2, "z"]}'

VECTORS: dict[str, tuple[str, str | None, list[Any]]] = {
    "no call": ("Just text.</s>", "Just text.", []),
    "empty": ("", "", []),
    "a list": (f"[TOOL_CALLS][{CALL_F}]</s>", None, [F]),
    "a list after a space": (f"[TOOL_CALLS] [{CALL_F}, {CALL_G}]</s>", None, [F, G]),
    "one object": (f"[TOOL_CALLS]{CALL_F}</s>", None, [F]),
    "an empty list": ("[TOOL_CALLS][]</s>", "[TOOL_CALLS][]", []),
    "text before": (f"Let me see.[TOOL_CALLS][{CALL_F}]</s>", "Let me see.", [F]),
    "name and arguments": ('[TOOL_CALLS]f[ARGS]{"x": 1}</s>', None, [F]),
    "two of them": (f'[TOOL_CALLS]f[ARGS]{{"x": 1}}[TOOL_CALLS]g-2.b[ARGS]{ARGS_G}</s>', None, [F, G]),
    "with an id": (f'[TOOL_CALLS]f[CALL_ID]abcdefgh1[ARGS]{{"x": 1}}[TOOL_CALLS]g-2.b[ARGS]{ARGS_G}', None, [F, G]),
    "an id and nothing else": ('[TOOL_CALLS]f[CALL_ID]abcdefgh1{"x": 1}', None, [F]),
    "bare": (f'[TOOL_CALLS]f{{"x": 1}}[TOOL_CALLS]g-2.b{ARGS_G}</s>', None, [F, G]),
    "spaces": ('[TOOL_CALLS] f [ARGS] {"x": 1} </s>', None, [F]),
    "no arguments": ("[TOOL_CALLS]f[ARGS]{}</s>", None, [("f", {})]),
    "text before and arguments": ('Hm.\n[TOOL_CALLS]f[ARGS]{"x": 1}', "Hm.\n", [F]),
    "both forms": (f'[TOOL_CALLS]f[ARGS]{{"x": 1}}[TOOL_CALLS][{CALL_G}]</s>', None, [F, G]),
    "no name": ('[TOOL_CALLS][ARGS]{"x": 1}</s>', '[TOOL_CALLS][ARGS]{"x": 1}', []),
    "two names": ('[TOOL_CALLS]f g[ARGS]{"x": 1}', '[TOOL_CALLS]f g[ARGS]{"x": 1}', []),
    "arguments that are no object": ("[TOOL_CALLS]f[ARGS][1]</s>", "[TOOL_CALLS]f[ARGS][1]", []),
    "nothing behind the marker": ("ok [TOOL_CALLS]</s>", "ok [TOOL_CALLS]", []),
    "a name alone": ("[TOOL_CALLS]f</s>", "[TOOL_CALLS]f", []),
    "text behind the call": ('[TOOL_CALLS]f[ARGS]{"x": 1} so', " so", [F]),
    "cut in the name": ("[TOOL_CALLS]get_w", "[TOOL_CALLS]get_w", []),
    "cut in the marker": ('[TOOL_CALLS]f[ARGS]{"x": 1}[TOOL_CALLS]g[ARGS]', "[TOOL_CALLS]g[ARGS]", [F]),
    "cut in the arguments": ('[TOOL_CALLS]f[ARGS]{"x": [1, ', '[TOOL_CALLS]f[ARGS]{"x": [1, ', []),
    "cut in the list": (f'[TOOL_CALLS][{CALL_F}, {{"na', ', {"na', [F]),
    "a very long name": ("[TOOL_CALLS]" + "n" * 600 + "[ARGS]{}", "[TOOL_CALLS]" + "n" * 600 + "[ARGS]{}", []),
}


@pytest.mark.parametrize("name", VECTORS)
def test_replies(check_vector, name):
    reply, content, calls = VECTORS[name]
    check_vector(MistralFormat(), reply, (content, calls), MARKERS)


@pytest.mark.parametrize(
    "reply", [f"[TOOL_CALLS][{CALL_F}, {CALL_G}]", "[TOOL_CALLS]f[CALL_ID]abc[ARGS]{}[TOOL_CALLS]g{}"]
)
def test_ids_are_what_the_templates_take(reply):
    parser = MistralFormat().make_parser(match_text=True)
    calls = fold([*parser.feed(reply), *parser.finish()]).tool_calls
    assert len({call.id for call in calls}) == 2
    assert all(re.fullmatch("[A-Za-z0-9]{9}", call.id) for call in calls)


def test_ids_of_other_forms_are_rewritten_for_the_prompt():
    rewrite = MistralFormat().template_call_id
    assert rewrite("abcdefgh1") == "abcdefgh1"
    ids = ["call_abc", "", "abcdefgh", "abcdefgh_", "é" * 9, "\ud800"]
    rewritten = [rewrite(call_id) for call_id in ids]
    assert all(re.fullmatch("[A-Za-z0-9]{9}", call_id) for call_id in rewritten)
    assert len(set(rewritten)) == len(ids)
    assert [rewrite(call_id) for call_id in ids] == rewritten


def test_arguments_stream_behind_a_name():
    parser = MistralFormat().make_parser()
    assert parser.feed(ControlToken("[TOOL_CALLS]", 5)) == []
    assert parser.feed("get") == []
    assert parser.feed("_weather") == []
    assert parser.feed(ControlToken("[ARGS]", 6)) == []
    start, first = parser.feed('{"city')
    assert isinstance(start, ToolCallStart)
    assert (start.name, first) == ("get_weather", ToolCallArguments(0, '{"city'))
    assert parser.feed('": "a}"') == [ToolCallArguments(0, '": "a}"')]
    assert parser.feed("}") == [ToolCallArguments(0, "}"), ToolCallEnd(0)]
    assert parser.finish() == []


def test_a_call_that_breaks_off_is_taken_back():
    parser = MistralFormat().make_parser()
    parser.feed(ControlToken("[TOOL_CALLS]", 5))
    parser.feed('f[ARGS]{"x": ')
    assert parser.finish() == [ToolCallAborted(0, '[TOOL_CALLS]f[ARGS]{"x": ')]
