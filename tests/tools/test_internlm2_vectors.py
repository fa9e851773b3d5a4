"""Recorded outputs of InternLM2 models, parsed whole, in every two parts, in small pieces and in random ones.

The recordings have markers spelled. With token ids, a marker is one piece of its own and spelling means nothing.
"""

import re
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmdserve.tools.api import ControlToken, Piece, ToolCallArguments, ToolCallStart, fold

MARKERS = re.compile(r"<\|(?:action_start|action_end|plugin|interpreter|im_end)\|>")
TOKEN_IDS = {
    "<|plugin|>": 92538,
    "<|interpreter|>": 92539,
    "<|action_end|>": 92540,
    "<|action_start|>": 92541,
    "<|im_end|>": 92542,
}
# Markers that the model did not emit as control tokens, by vector.
SPELLED_MARKERS = {"quoted_marker_in_prose": 0, "rs_end_marker_in_string": 2}

Vector = dict[str, Any]


def expected_result(vector: Vector) -> tuple[str | None, list[tuple[str, Any]]]:
    calls = []
    for call in vector["expected"]["tool_calls"]:
        if call["kind"] == "plugin":
            calls.append((call["name"], call["arguments"]))
        else:
            language = {"language": call["language"]} if call["language"] else {}
            calls.append(("code_interpreter", {**language, "code": call["code"]}))
    return vector["expected"]["content"], calls


def in_threes(text: str) -> list[str]:
    return [text[start : start + 3] for start in range(0, len(text), 3)]


def by_token(vector: Vector, split: Callable[[str], list[str]]) -> list[Piece]:
    """Return the vector's text in pieces, with control tokens where the model emitted them."""
    pieces: list[Piece] = []
    plain = ""
    position = 0
    for number, match in enumerate(MARKERS.finditer(vector["raw"])):
        plain += vector["raw"][position : match.start()]
        if SPELLED_MARKERS.get(vector["id"]) == number:
            plain += match.group()
        else:
            pieces += [*split(plain), ControlToken(match.group(), TOKEN_IDS[match.group()])]
            plain = ""
        position = match.end()
    return pieces + split(plain + vector["raw"][position:])


def with_markers_whole(text: str) -> list[str]:
    """Return the text with each spelled marker as one piece, and threes of characters between them."""
    pieces: list[str] = []
    position = 0
    for match in MARKERS.finditer(text):
        pieces += [*in_threes(text[position : match.start()]), match.group()]
        position = match.end()
    return pieces + in_threes(text[position:])


def test_the_recordings_are_all_there(tool_output_vectors):
    assert len(tool_output_vectors) >= 39
    assert {call["kind"] for vector in tool_output_vectors for call in vector["expected"]["tool_calls"]} == {
        "plugin",
        "interpreter",
    }


def test_whole_text(tool_output_vectors, parse, result_of):
    for vector in tool_output_vectors:
        assert result_of(parse([vector["raw"]], match_text=True)) == expected_result(vector), vector["id"]


def test_markers_whole_and_small_pieces(tool_output_vectors, parse, result_of):
    for vector in tool_output_vectors:
        pieces = with_markers_whole(vector["raw"])
        assert result_of(parse(pieces, match_text=True)) == expected_result(vector), vector["id"]


def test_single_characters(tool_output_vectors, parse, result_of):
    for vector in tool_output_vectors:
        assert result_of(parse(vector["raw"], match_text=True)) == expected_result(vector), vector["id"]


def test_every_split_in_two(tool_output_vectors, parse, result_of):
    for vector in tool_output_vectors:
        raw = vector["raw"]
        for cut in range(len(raw) + 1):
            result = result_of(parse([raw[:cut], raw[cut:]], match_text=True))
            assert result == expected_result(vector), (vector["id"], cut)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_pieces(tool_output_vectors, parse, result_of, data):
    vector = data.draw(st.sampled_from(tool_output_vectors))
    raw = vector["raw"]
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=30)))
    pieces = [raw[start:end] for start, end in zip([0, *cuts], [*cuts, len(raw)], strict=True)]
    assert result_of(parse(pieces, match_text=True)) == expected_result(vector)


def test_token_ids_with_any_pieces_between_them(tool_output_vectors, parse, result_of):
    for vector in tool_output_vectors:
        if "[UNUSED_TOKEN" in vector["raw"]:
            continue
        for split in (lambda text: [text], in_threes, list):
            result = result_of(parse(by_token(vector, split), match_text=False))
            assert result == expected_result(vector), vector["id"]


def test_spelled_markers_are_text_where_ids_are_known(tool_output_vectors, parse, result_of):
    for vector in tool_output_vectors:
        for pieces in ([vector["raw"]], list(vector["raw"])):
            assert result_of(parse(pieces, match_text=False)) == (vector["raw"], []), vector["id"]


def test_reserved_names_are_markers_when_they_come_by_id(tool_output_vectors, parse, result_of):
    vector = next(vector for vector in tool_output_vectors if vector["id"] == "ollama_unused_names")
    parts = re.split(r"(\[UNUSED_TOKEN_14\d\])", vector["raw"])
    pieces = [ControlToken(part, 92397 + int(part[14:-1])) if part.startswith("[UNUSED") else part for part in parts]
    assert result_of(parse(pieces, match_text=False)) == expected_result(vector)


def test_arguments_stream_in_fragments_that_add_up_to_the_whole_ones(tool_output_vectors, parse):
    for vector in tool_output_vectors:
        whole = fold(parse([vector["raw"]], match_text=True))
        events = parse(vector["raw"], match_text=True)
        assert [call.arguments for call in fold(events).tool_calls] == [call.arguments for call in whole.tool_calls]
        starts = [event.index for event in events if isinstance(event, ToolCallStart)]
        assert starts == list(range(len(starts)))
        fragments = [event.fragment for event in events if isinstance(event, ToolCallArguments)]
        assert all(fragments)
        if vector["id"] == "zh_args":
            assert len(fragments) == len(whole.tool_calls[0].arguments)


@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutated_outputs_never_raise_and_do_not_depend_on_the_split(tool_output_vectors, parse, result_of, data):
    raw = data.draw(st.sampled_from(tool_output_vectors))["raw"]
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(raw)))
        end = data.draw(st.integers(start, min(start + 8, len(raw))))
        raw = raw[:start] + data.draw(st.text(max_size=3) | st.sampled_from(['"', "}", "\\", raw])) + raw[end:]
    content, calls = whole = result_of(parse([raw], match_text=True))
    assert result_of(parse(raw, match_text=True)) == whole
    assert result_of(parse(in_threes(raw), match_text=True)) == whole
    if not calls:
        assert raw.startswith(content)
        assert re.fullmatch(r"((<\|im_end\|>|\[UNUSED_TOKEN_145\])\s*)*", raw[len(content) :])
