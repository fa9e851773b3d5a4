"""The incremental parser against a plain one that sees the whole reply, and what it does with broken replies."""

import json
import re
import time
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmdserve.tools.api import (
    ContentDelta,
    ControlToken,
    Piece,
    ToolCallAborted,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
)
from lmdserve.tools.internlm2 import InternLM2Format

START = ControlToken("<|action_start|>", 92541)
END = ControlToken("<|action_end|>", 92540)
PLUGIN = ControlToken("<|plugin|>", 92538)
INTERPRETER = ControlToken("<|interpreter|>", 92539)
TURN_END = ControlToken("<|im_end|>", 92542)

CALL_F = '{"name": "f", "parameters": {"x": 1}}'
CALL_G = '{"name": "g", "arguments": {"y": [2, "z"]}}'
F = ("f", {"x": 1})
G = ("g", {"y": [2, "z"]})


class Pairs(list[tuple[str, Any]]):
    """A JSON object with its members in order, so that repeated ones show."""


def refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


DECODER = json.JSONDecoder(object_pairs_hook=Pairs, parse_constant=refuse_constant)


def plain_value(value: Any) -> Any:
    if isinstance(value, Pairs):
        return {key: plain_value(member) for key, member in value}
    return [plain_value(item) for item in value] if isinstance(value, list) else value


def read_call(text: str, position: int) -> tuple[tuple[str, Any], int] | None:
    """Return the call at `position` and where it ends, or None."""
    if text[position : position + 1] != "{":
        return None
    try:
        members, end = DECODER.raw_decode(text, position)
    except (ValueError, RecursionError):
        return None
    names = [value for key, value in members if key == "name"]
    arguments = [value for key, value in members if key in ("parameters", "arguments") and value is not None]
    if len(names) != 1 or not isinstance(names[0], str) or not names[0] or re.search("[\ud800-\udfff]", names[0]):
        return None
    if arguments and not isinstance(arguments[0], Pairs):
        return None
    return (names[0], plain_value(arguments[0]) if arguments else {}), end


def skip(pattern: str, text: str, position: int) -> int:
    match = re.compile(pattern).match(text, position)
    assert match
    return match.end()


def read_plugin(body: str) -> tuple[list[tuple[str, Any]], str]:
    """Return the calls in an action's text and the text that is left over."""
    position = skip(r"\s*(?:```[^\W_]*)?\s*", body, 0)
    is_fenced = "```" in body[:position]
    if body[position : position + 1] != "[":
        call = read_call(body, position)
        return ([call[0]], left_over(body, call[1], is_fenced)) if call else ([], body)
    calls: list[tuple[str, Any]] = []
    last_end = 0
    position += 1
    while call := read_call(body, skip(r"[ \t\n\r]*", body, position)):
        calls.append(call[0])
        last_end = call[1]
        position = skip(r"[ \t\n\r]*", body, last_end)
        if body[position : position + 1] == "]":
            return calls, body[last_end:] if left_over(body, position + 1, is_fenced) else ""
        if body[position : position + 1] != ",":
            break
        position += 1
    return calls, body[last_end:]


def left_over(body: str, position: int, is_fenced: bool) -> str:
    closing = r"\s*(?:```\s*)?" if is_fenced else r"\s*"
    return "" if re.fullmatch(closing, body[position:]) else body[position:]


def read_code(body: str, *, is_ended: bool) -> dict[str, str] | None:
    """Return the arguments of an interpreter block, or None where there is no code or no end of it."""
    language = ""
    header = re.match(r"\s*```([^\n`]*)(\n|(?=`))", body)
    if header:
        language, inline = (header[1].strip(), "") if header[2] else ("", header[1].lstrip())
        code = inline + body[header.end() :]
    elif body.lstrip().startswith("```"):
        return None
    else:
        _, newline, indentation = body[: len(body) - len(body.lstrip())].rpartition("\n")
        code = (indentation if newline else "") + body.lstrip()
    code = code.rstrip()
    num_backticks = len(code) - len(code.rstrip("`"))
    if header and num_backticks % 4 == 3:  # four in a row are code
        code = code[:-3].rstrip() if num_backticks == 3 else code[:-3]
    elif not is_ended:
        return None
    if not code.strip():
        return None
    return {"language": language, "code": code} if language else {"code": code}


def read_reply(pieces: list[Piece]) -> tuple[str | None, list[tuple[str, Any]]]:
    """Parse a whole reply with token ids; a turn end may only stand last."""
    segments: list[Piece] = []
    for piece in pieces:
        if segments and not isinstance(piece, ControlToken) and not isinstance(segments[-1], ControlToken):
            segments[-1] += piece
        else:
            segments.append(piece)
    items: list[str | tuple[str, Any]] = []
    while segments:
        segment = segments.pop(0)
        if segment is START:
            read_action(segments, items)
        elif segment is not TURN_END:
            items.append(str(segment))
    return without_lone_whitespace(items)


def read_action(segments: list[Piece], items: list[str | tuple[str, Any]]) -> None:
    raw = str(START)
    if segments and not isinstance(segments[0], ControlToken) and not segments[0].strip():
        raw += segments.pop(0)
    if not segments or (segments[0] is not PLUGIN and segments[0] is not INTERPRETER):
        items.append(raw)
        return
    kind = segments.pop(0)
    body = ""
    while segments and not any(segments[0] is marker for marker in (START, END, TURN_END)):
        body += segments.pop(0)
    if kind is PLUGIN:
        calls, rest = read_plugin(body)
    else:
        arguments = read_code(body, is_ended=bool(segments))
        calls, rest = ([("code_interpreter", arguments)], "") if arguments else ([], body)
    items.extend(calls)
    items.append(rest if calls else raw + kind + rest)
    if calls and segments and segments[0] is END:
        segments.pop(0)


def without_lone_whitespace(items: list[str | tuple[str, Any]]) -> tuple[str | None, list[tuple[str, Any]]]:
    calls = [item for item in items if not isinstance(item, str)]
    content = ""
    run = ""
    has_call_before = False
    for item in items:
        if isinstance(item, str):
            run += item
            continue
        content += run if run.strip() else ""
        run, has_call_before = "", True
    content += run if run.strip() or not has_call_before else ""
    return (content if content or not calls else None), calls


FRAGMENTS = st.sampled_from(
    [
        *(START, END, PLUGIN, INTERPRETER) * 3,
        *(
            "<|action_start|>",
            "<|action_end|>",
            "<|plugin|>",
            " ",
            "\n",
            "text",
            "```",
            "```json\n",
            "```python\n",
            "`",
        ),
        *(CALL_F, CALL_G, f"[{CALL_F}, {CALL_G}]", f"[{CALL_F},", ",", "]", "[", "{", "}", "print(1)\n", "\x85"),
        *(
            '{"name": "h"',
            ', "parameters": ',
            '{"k": "',
            '"v", ',
            "null",
            '"',
            "\\",
            "\\ud800",
            '"name": "h"',
            ": 1.5e3",
        ),
        *('{"arguments": {"a": {}}, "name": "late"}', '{"name": ""}', '{"name": "p", "params": {}}', "NaN", "你好"),
    ]
)
WELL_FORMED = st.sampled_from(
    [
        [START, PLUGIN, "\n" + CALL_F, END],
        [START, " ", PLUGIN, f"```json\n[{CALL_F}, {CALL_G}]\n```\n", END],
        [START, INTERPRETER, "\n```python\nx = '```'\n\nprint(x)\n```", END],
        [START, INTERPRETER, "\n\n  y = 2\n", END],
        ["Some text."],
        ["\n"],
    ]
)
CODE = st.lists(st.sampled_from(["`", "``", "```", "```python\n", "```\n", " ", "\n", "  x = 1", "y"]), max_size=6)
JSON_PARTS = st.lists(st.sampled_from(["[", "]", ",", " ", "```", "```json\n", CALL_F, CALL_G, "{", "}"]), max_size=6)
BLOCKS = st.builds(lambda code, end: [START, INTERPRETER, *code, *end], CODE, st.sampled_from([[END], []])) | st.builds(
    lambda parts, end: [START, PLUGIN, *parts, *end], JSON_PARTS, st.sampled_from([[END], []])
)


@st.composite
def replies(draw: st.DrawFn) -> list[Piece]:
    """Return the pieces of a reply: good parts and fragments, some of it cut, doubled or left out, in any split."""
    parts = draw(st.lists(WELL_FORMED | BLOCKS | st.lists(FRAGMENTS, max_size=4), max_size=5))
    pieces = [piece for part in parts for piece in part]
    if pieces and draw(st.booleans()):
        del pieces[draw(st.integers(0, len(pieces) - 1))]
    if pieces and draw(st.booleans()):
        at = draw(st.integers(0, len(pieces) - 1))
        if not isinstance(pieces[at], ControlToken):
            pieces[at] = pieces[at][: draw(st.integers(0, len(pieces[at])))]
    return pieces + ([TURN_END] if draw(st.booleans()) else [])


def split(pieces: list[Piece], size: int) -> list[Piece]:
    split_pieces: list[Piece] = []
    for piece in pieces:
        if isinstance(piece, ControlToken):
            split_pieces.append(piece)
        else:
            split_pieces += [piece[start : start + size] for start in range(0, len(piece), size)]
    return split_pieces


PROPERTY = settings(max_examples=600, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


@PROPERTY
@given(replies())
def test_any_reply_in_any_pieces_is_what_the_plain_parser_says(parse, result_of, pieces):
    expected = read_reply(pieces)
    for size in (1, 3, 1000):
        assert result_of(parse(split(pieces, size), match_text=False)) == expected


@PROPERTY
@given(replies())
def test_a_reply_without_calls_is_all_content(parse, result_of, pieces):
    content, calls = result_of(parse(split(pieces, 2), match_text=False))
    if not calls:
        assert content == "".join(piece for piece in pieces if piece is not TURN_END)


@PROPERTY
@given(replies(), st.randoms(use_true_random=False))
def test_spelled_replies_do_not_depend_on_the_split(parse, result_of, pieces, random):
    text = "".join(pieces)
    cuts = sorted(random.randrange(len(text) + 1) for _ in range(6))
    parts = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    whole = result_of(parse([text], match_text=True))
    assert result_of(parse(parts, match_text=True)) == whole
    assert result_of(parse(text, match_text=True)) == whole
    content, calls = whole
    if not calls:
        assert re.sub(r"<\|im_end\|>\s*\Z", "", text) in (content, content.removesuffix("<|im_end|>"))


@PROPERTY
@given(st.lists(st.text(max_size=5) | st.sampled_from([START, END, PLUGIN, INTERPRETER, TURN_END]), max_size=12))
def test_events_are_in_order_whatever_comes(parse, pieces):
    """A call starts once, ends or is aborted before the next, and only then; indices rise by one."""
    for match_text in (False, True):
        open_index = None
        next_index = 0
        for event in parse(pieces, match_text=match_text):
            match event:
                case ContentDelta(text):
                    assert text
                    assert open_index is None
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


def test_every_word_of_a_reply_is_used_once(parse, result_of):
    pieces = [
        "word0 ",
        *(START, PLUGIN, '{"name": "word1", "parameters": {"word2": "word3"}} word4', END, "word5"),
        *(
            START,
            PLUGIN,
            '[{"arguments": {"word6": 1}, "name": "word7"}, {"name": "word8", "arguments": {"word9": }]',
            END,
        ),
        *(START, INTERPRETER, "word10()", END, START, "word11", PLUGIN, "word12", START, PLUGIN, '{"word13', TURN_END),
    ]
    content, calls = result_of(parse(split(pieces, 2), match_text=False))
    used = content + json.dumps(calls)
    assert sorted(re.findall(r"word\d+", used)) == sorted(f"word{number}" for number in range(14))
    assert [name for name, _ in calls] == ["word1", "word7", "code_interpreter"]


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        ([START, PLUGIN, CALL_F, TURN_END], (None, [F])),
        ([START, PLUGIN, CALL_F], (None, [F])),
        ([START, PLUGIN, CALL_F, START, PLUGIN, CALL_G], (None, [F, G])),
        ([START, PLUGIN, CALL_F, " and so on", END, "!"], (" and so on!", [F])),
        ([START, PLUGIN, CALL_F, "}", END], ("}", [F])),
        ([START, PLUGIN, CALL_F, END, "\n", START, PLUGIN, CALL_G, END, "\n"], (None, [F, G])),
        (["\n ", START, PLUGIN, CALL_F, END], (None, [F])),
        ([START, PLUGIN, f"[{CALL_F}, {{]", END], (", {]", [F])),
        ([START, PLUGIN, f"[{CALL_F}", END], (None, [F])),
        ([START, PLUGIN, f"[ {CALL_F} , {CALL_G} ] ", END], (None, [F, G])),
        ([START, PLUGIN, '{ "name" : "f" , "parameters" : { "x" : 1 } }', END], (None, [F])),
        ([START, PLUGIN, "[]", END], ("<|action_start|><|plugin|>[]<|action_end|>", [])),
        ([START, PLUGIN, "``json\n", CALL_F, END], (f"<|action_start|><|plugin|>``json\n{CALL_F}<|action_end|>", [])),
        ([START, PLUGIN, f"```\n{CALL_F}``", END], ("``", [F])),
        ([START, PLUGIN, '{"parameters": {}}'], ('<|action_start|><|plugin|>{"parameters": {}}', [])),
        ([START, PLUGIN, '{"name": "f", "name": "g"}'], ('<|action_start|><|plugin|>{"name": "f", "name": "g"}', [])),
        ([START, PLUGIN, '{"name": "\\ud800"}'], ('<|action_start|><|plugin|>{"name": "\\ud800"}', [])),
        ([START, PLUGIN, '{"na\\u006de": "\\u4f60", "id": 7}'], (None, [("你", {})])),
        ([START, PLUGIN, '{"name": "f", "parameters": null, "arguments": {"x": 1}}'], (None, [F])),
        ([START, START, PLUGIN, CALL_F, END], ("<|action_start|>", [F])),
        ([START, END], ("<|action_start|><|action_end|>", [])),
        ([START], ("<|action_start|>", [])),
        ([PLUGIN, CALL_F, END], (f"<|plugin|>{CALL_F}<|action_end|>", [])),
        (["a", TURN_END], ("a", [])),
        ([" ", TURN_END], (" ", [])),
        ([" "], (" ", [])),
        ([], ("", [])),
        ([ControlToken("<unk>", 0)], ("<unk>", [])),
    ],
)
def test_case(parse, result_of, pieces, expected):
    for size in (1, 1000):
        assert result_of(parse(split(pieces, size), match_text=False)) == expected


def test_a_turn_end_that_is_only_spelled_is_content_if_text_follows(parse, result_of):
    assert result_of(parse("say <|im_end|> to stop", match_text=True)) == ("say <|im_end|> to stop", [])
    assert result_of(parse("say <|im_end|>\n", match_text=True)) == ("say ", [])
    assert result_of(parse(["say <|im_end|>"], match_text=False)) == ("say <|im_end|>", [])


def test_the_name_comes_whole_and_arguments_as_they_are_written(parse):
    events = parse(
        [START, PLUGIN, '{"na', 'me": "get', '_it", "para', 'meters": {', '"a": ', "1}", "}", END], match_text=False
    )
    kinds = [type(event) for event in events]
    assert kinds == [ToolCallStart, ToolCallArguments, ToolCallArguments, ToolCallArguments, ToolCallEnd]
    assert events[0].name == "get_it"
    assert [event.fragment for event in events[1:4]] == ["{", '"a": ', "1}"]


def test_a_call_that_breaks_later_is_taken_back_with_all_its_text(parse):
    events = parse(["Now ", START, PLUGIN, '{"name": "f", "parameters": {"a": 1', ",}}", END], match_text=False)
    assert events[1].name == "f"
    assert events[2:4] == [
        ToolCallArguments(0, '{"a": 1'),
        ToolCallArguments(0, ","),
    ]
    assert events[4] == ToolCallAborted(0, '<|action_start|><|plugin|>{"name": "f", "parameters": {"a": 1,')
    assert events[5:] == [ContentDelta("}}"), ContentDelta("<|action_end|>")]


def test_arguments_that_cannot_be_any_never_start_a_call(parse):
    for arguments in ('"not a dict"', "[1]", "3", "true"):
        events = parse([START, PLUGIN, '{"name": "f", "parameters": ', arguments, "}", END], match_text=False)
        assert {type(event) for event in events} == {ContentDelta}


def test_content_is_not_held_back_longer_than_a_marker_may_need():
    """Nothing but a possible beginning of a marker waits for the next piece."""
    by_id = InternLM2Format().make_parser()
    assert by_id.feed("a <|action_st") == [ContentDelta("a <|action_st")]
    spelled = InternLM2Format().make_parser(match_text=True)
    assert spelled.feed("a <|action_st") == [ContentDelta("a ")]
    assert spelled.feed("op") == [ContentDelta("<|action_stop")]


def parse_time_s(parse, num_characters: int, *, opening: list[Piece], pattern: str) -> float:
    text = pattern * (num_characters // len(pattern))
    start = time.process_time()
    parse([*opening, *text, END], match_text=False)
    return time.process_time() - start


@pytest.mark.parametrize(
    ("opening", "pattern"),
    [
        ([START, PLUGIN, '{"name": "f", "parameters": {"a": "'], "words "),
        ([START, PLUGIN, '{"parameters": {"a": "'], "words "),
        ([START, PLUGIN, '{"name": "f", "other": ["'], "words "),
        ([START, PLUGIN, '{"'], "words "),
        ([START, INTERPRETER, "```python\nx"], "\n"),
        ([START, INTERPRETER, "```"], "python"),
        ([START], " "),
        ([], " "),
    ],
)
def test_time_is_linear_in_the_length_for_single_characters(parse, opening, pattern):
    """Sixteen times the text takes about sixteen times as long; reading from the start again would be 256 times."""
    short = min(parse_time_s(parse, 3_000, opening=opening, pattern=pattern) for _ in range(3))
    long = min(parse_time_s(parse, 48_000, opening=opening, pattern=pattern) for _ in range(2))
    assert long < 60 * short
