"""The resumable JSON scanner against Python's own parser."""

import json
import time
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmdserve.tools.json_scanner import JsonScanner, ScanState

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda children: st.lists(children) | st.dictionaries(st.text(), children),
    max_leaves=20,
)


def refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


REFERENCE = json.JSONDecoder(parse_constant=refuse_constant)


def scan(pieces: Iterable[str]) -> tuple[ScanState, int]:
    """Return the scanner's state after the pieces and the number of characters it took."""
    scanner, num_characters = JsonScanner(), 0
    for piece in pieces:
        num_characters += scanner.feed(piece)
        if scanner.state is not ScanState.OPEN:
            break
    return scanner.state, num_characters


@pytest.mark.parametrize("text", ['{"a": [1, -0.5e+3, true], "b\\n\\u00e9": {}}', "[ ]", '"x"', "null", '[[],{"":""}]'])
def test_takes_a_value_and_not_what_follows(text: str):
    assert scan([text + " }rest"]) == (ScanState.DONE, len(text))
    assert scan([text[:-1]])[0] is ScanState.OPEN


@pytest.mark.parametrize("number", ["0", "-0", "10", "0.5", "-1.25", "1e5", "1E+05", "12345678901234567890e-7"])
def test_a_bare_number_ends_with_the_next_character(number: str):
    assert scan([number]) == (ScanState.OPEN, len(number))
    assert scan([*number, ","]) == (ScanState.DONE, len(number))


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        ("", "}"),
        ("", "'"),
        ("", "N"),
        ("", "+"),
        ("", "."),
        ("-", "I"),
        ("-", " "),
        ("[0", "1"),
        ("[1.", "]"),
        ("[1e", "]"),
        ("[1e+", ","),
        ("[1", "x"),
        ("[1,", "]"),
        ("[", ","),
        ("[1 ", "2"),
        ("[1", "}"),
        ("{", "a"),
        ("{", ","),
        ('{"a"', "}"),
        ('{"a":', "}"),
        ('{"a":1,', "}"),
        ('{"a":1', "]"),
        ("{", "1"),
        ("tru", "}"),
        ("nul", "L"),
        ('"a', "\n"),
        ('"a', "\x00"),
        ('"\\', "x"),
        ('"\\u00', "g"),
        ('"\\u', "٣"),
        ("[", "٣"),
        ("[", "\u00a0"),
    ],
)
def test_the_first_impossible_character_is_named(good: str, bad: str):
    assert scan([good])[0] is ScanState.OPEN
    assert scan([good + bad + "rest"]) == (ScanState.INVALID, len(good))
    assert scan([*good, bad]) == (ScanState.INVALID, len(good))


@given(JSON_VALUES, st.booleans(), st.sampled_from([None, 0, 2]), st.data())
def test_any_value_in_any_pieces_is_found_whole(
    value: object, ascii_only: bool, indent: int | None, data: st.DataObject
):
    text = json.dumps([value], ensure_ascii=ascii_only, indent=indent)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=5)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert scan([*pieces, "[rest"]) == (ScanState.DONE, len(text))


@given(st.text(alphabet='[]{}:,"\\ \n0123.-+eEtrufalsn/bu\x01é', max_size=12))
def test_agrees_with_pythons_parser_on_what_is_json(inside: str):
    """Containers only: a bare number goes as far as it can in Python's parser, and this one judges the rest of it."""
    for text in (f"[{inside}]", f'{{"k":{inside}}}', f'["{inside}"]'):
        try:
            _, end = REFERENCE.raw_decode(text)
        except ValueError:
            assert scan([text])[0] is not ScanState.DONE
            assert scan(text)[0] is not ScanState.DONE
        else:
            assert scan([text]) == scan(text) == (ScanState.DONE, end)


def test_in_string_is_true_inside_keys_and_values_only():
    text = '{"k\\"": ["v", 1]}'
    flag = "_TTTT____TT______"
    scanner = JsonScanner()
    for character, expected in zip(text, flag, strict=True):
        scanner.feed(character)
        assert scanner.in_string == (expected == "T")


def test_deep_nesting_does_not_recurse():
    depth = 100_000
    assert scan(["[" * depth, "]" * depth]) == (ScanState.DONE, 2 * depth)


def scan_time_s(num_characters: int) -> float:
    text = '{"k": "' + "abcdefgh\\n " * (num_characters // 11) + '"}'
    start = time.process_time()
    assert scan(text)[0] is ScanState.DONE
    return time.process_time() - start


def test_time_is_linear_in_the_length_for_single_characters():
    """Sixteen times the text takes about sixteen times as long; scanning from the start again would be 256 times."""
    short = min(scan_time_s(4_000) for _ in range(3))
    long = min(scan_time_s(64_000) for _ in range(2))
    assert long < 60 * short
