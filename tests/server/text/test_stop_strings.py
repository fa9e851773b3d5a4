"""Stop strings against a brute-force search over the whole text, for every way to cut the text into chunks."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lmdserve.server.text import StopResult, StopStrings


def _first_stop(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Grow the text by one character at a time and look for a stop string at its end."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            longest = max(complete, key=len)
            return text[: end - len(longest)], longest
    return text, None


def _run(stops: list[str], chunks: list[str]) -> tuple[str, str | None]:
    matcher = StopStrings(stops)
    visible = ""
    for chunk in chunks:
        text, matched = matcher.feed(chunk)
        visible += text
        if matched is not None:
            return visible, matched
    return visible + matcher.flush(), None


@given(
    stops=st.lists(st.text("ab", min_size=1, max_size=5), max_size=4),
    chunks=st.lists(st.text("abc", max_size=6), max_size=8),
)
@example(stops=["aab"], chunks=["aa", "ab"])
@example(stops=["abab", "bb"], chunks=["aba", "bb"])
@example(stops=["abcd", "bc"], chunks=["abc"])
def test_finds_what_brute_force_finds(stops: list[str], chunks: list[str]) -> None:
    assert _run(stops, chunks) == _first_stop("".join(chunks), stops)


@given(stop=st.text("ab", min_size=1, max_size=6), text=st.text("abc", max_size=30))
def test_never_lets_out_what_may_become_a_stop_string(stop: str, text: str) -> None:
    """What is visible after each character is exactly the text before the longest possible beginning."""
    matcher = StopStrings([stop])
    visible = ""
    for end, character in enumerate(text, start=1):
        shown, matched = matcher.feed(character)
        visible += shown
        if matched is not None:
            assert text[:end] == visible + stop
            return
        held = next(n for n in range(len(stop) - 1, -1, -1) if text[:end].endswith(stop[:n]))
        assert visible == text[: end - held]


def test_a_stop_string_across_chunks() -> None:
    matcher = StopStrings(["\n\nUser:"])
    assert matcher.feed("Hello.\n") == StopResult("Hello.", None)
    assert matcher.feed("\nUs") == StopResult("", None)
    assert matcher.feed("er: more") == StopResult("", "\n\nUser:")


def test_what_was_held_comes_out_when_it_was_no_stop_string() -> None:
    matcher = StopStrings(["END"])
    assert matcher.feed("the EN") == StopResult("the ", None)
    assert matcher.feed("TRY") == StopResult("ENTRY", None)
    assert matcher.feed("E") == StopResult("", None)
    assert matcher.flush() == "E"
    assert matcher.flush() == ""


def test_nothing_comes_after_a_match() -> None:
    matcher = StopStrings(["."])
    assert matcher.feed("a.b") == StopResult("a", ".")
    assert matcher.feed("c") == StopResult("", ".")
    assert matcher.flush() == ""


def test_without_stop_strings_text_passes() -> None:
    assert StopStrings([]).feed("anything") == StopResult("anything", None)


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        StopStrings(["a", ""])
