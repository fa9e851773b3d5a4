"""Whatever a model writes, in every format: no error, no dependence on the split, nothing lost, only whole calls."""

import json
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmdserve.tools.api import (
    ContentDelta,
    ControlToken,
    Event,
    Piece,
    ToolCallAborted,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
    ToolFormat,
    fold,
)
from lmdserve.tools.hermes import HermesFormat
from lmdserve.tools.internlm2 import InternLM2Format
from lmdserve.tools.llama import LlamaFormat
from lmdserve.tools.mistral import MistralFormat

TEXTS = ['{"name": "f", ', '"parameters": {"x": 1}', '"arguments": {}', "}", "; ", ", ", "[", "]", "```", "\n", " ",
         "f", "a", "f.call(x=1)", '{"x": [1', "é", '"', "\\", '{"name": "f", "arguments": {"y": "z"}}']  # fmt: skip
FORMATS: dict[str, tuple[ToolFormat, list[str], list[str]]] = {  # with markers, and those that only end a turn
    "hermes": (HermesFormat(), ["<tool_call>", "</tool_call>"], ["<|im_end|>"]),
    "internlm2": (
        InternLM2Format(), ["<|action_start|>", "<|plugin|>", "<|interpreter|>", "<|action_end|>"], ["<|im_end|>"]
    ),
    "llama": (LlamaFormat(), ["<|python_tag|>"], ["<|eom_id|>", "<|eot_id|>"]),
    "mistral": (MistralFormat(), ["[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"], ["</s>"]),
}  # fmt: skip


def events_of(tool_format: ToolFormat, pieces: Iterable[Piece], *, match_text: bool) -> list[Event]:
    parser = tool_format.make_parser(match_text=match_text, tool_names={"f", "code_interpreter"})
    return [event for piece in pieces for event in parser.feed(piece)] + parser.finish()


def result_of(events: list[Event]) -> tuple[str, list[tuple[str, Any]]]:
    folded = fold(events)
    return folded.content or "", [(call.name, json.loads(call.arguments)) for call in folded.tool_calls]


def check_order(events: list[Event]) -> None:
    """A call starts once, ends or is aborted before the next one starts; indices rise by one."""
    open_index, next_index = None, 0
    for event in events:
        match event:
            case ContentDelta(text):
                assert text
            case ToolCallStart(index):
                assert (open_index, index) == (None, next_index)
                open_index, next_index = index, index + 1
            case ToolCallArguments(index, fragment):
                assert index == open_index
                assert fragment
            case ToolCallEnd(index) | ToolCallAborted(index):
                assert index == open_index
                open_index = None
    assert open_index is None


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=250, deadline=None)
@given(data=st.data())
def test_any_reply(name: str, data: st.DataObject) -> None:
    tool_format, markers, turn_ends = FORMATS[name]
    parts = data.draw(st.lists(st.sampled_from([*TEXTS, *markers, *markers, *turn_ends]), max_size=9))
    for match_text in (False, True):
        whole: list[Piece] = []
        for part in parts:
            if part in markers or part in turn_ends:
                whole.append(part if match_text else ControlToken(part, 1000))
            elif whole and not isinstance(whole[-1], ControlToken):
                whole[-1] += part
            else:
                whole.append(part)
        events = events_of(tool_format, whole, match_text=match_text)
        check_order(events)
        content, calls = result_of(events)
        assert all(isinstance(arguments, dict) for _, arguments in calls)
        small = [piece for part in whole for piece in ([part] if isinstance(part, ControlToken) else part)]
        for pieces in (small, cut_at_random(data, whole)):
            events = events_of(tool_format, pieces, match_text=match_text)
            check_order(events)
            assert result_of(events) == (content, calls)
        if not calls:
            assert without(turn_ends, content) == without(turn_ends, "".join(parts))


def cut_at_random(data: st.DataObject, pieces: list[Piece]) -> list[Piece]:
    found: list[Piece] = []
    for piece in pieces:
        if isinstance(piece, ControlToken):
            found.append(piece)
            continue
        cuts = sorted(data.draw(st.lists(st.integers(0, len(piece)), max_size=3)))
        found += [piece[start:end] for start, end in zip([0, *cuts], [*cuts, len(piece)], strict=True)]
    return found


def without(turn_ends: list[str], text: str) -> str:
    for turn_end in turn_ends:
        text = text.replace(turn_end, "")
    return "".join(text.split())
