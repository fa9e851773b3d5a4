"""Fixtures of tool calling: what a parser is run on, and how its result is written down for comparison."""

import json
import re
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

import pytest

from lmdserve.tools.api import ControlToken, Event, Folded, Piece, ToolFormat, fold
from lmdserve.tools.internlm2 import InternLM2Format

FIXTURES = Path(__file__).resolve().parents[2].parent / "shared" / "fixtures"

Result = tuple[str | None, list[tuple[str, Any]]]


def read_fixture(name: str) -> Any:
    """Return a recorded fixture; the test is skipped where the recordings are not at hand."""
    path = FIXTURES / name
    if not path.exists():
        pytest.skip(f"needs the recording {name}")
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def tool_output_vectors() -> list[dict[str, Any]]:
    """Recorded and hand-written outputs of InternLM2 models, with what they mean."""
    return read_fixture("internlm2_tool_outputs.json")["vectors"]


@pytest.fixture(scope="session")
def chat_renderings() -> dict[str, Any]:
    """Conversations, and the prompts that public templates make of them."""
    return read_fixture("chat_render.json")


@pytest.fixture(scope="session")
def parse() -> Callable[..., list[Event]]:
    """Return a function that gives all events of a reply that comes in these pieces."""

    def parse_pieces(pieces: Iterable[Piece], *, match_text: bool) -> list[Event]:
        parser = InternLM2Format().make_parser(match_text=match_text)
        events = [event for piece in pieces for event in parser.feed(piece)]
        return events + parser.finish()

    return parse_pieces


@pytest.fixture(scope="session")
def check_vector(result_of: Callable[[list[Event]], Result]) -> Callable[..., None]:
    """Return a function that parses a reply in every way it can arrive, and expects the same result each time.

    `reply` has its markers spelled; `markers` are those that are control tokens, and come as such in all ways but one.
    """

    def check(
        tool_format: ToolFormat,
        reply: str,
        expected: Result,
        markers: Collection[str],
        tool_names: Collection[str] | None = None,
    ) -> None:
        def run(pieces: Iterable[Piece], *, match_text: bool = False) -> Result:
            parser = tool_format.make_parser(match_text=match_text, tool_names=tool_names)
            events = [event for piece in pieces for event in parser.feed(piece)]
            return result_of(events + parser.finish())

        parts = split_markers(reply, markers)
        assert run(parts) == expected, "whole texts between control tokens"
        assert run(character for part in parts for character in characters(part)) == expected, "single characters"
        for position, part in enumerate(parts):
            for cut in range(len(part)):
                if not isinstance(part, ControlToken):
                    pieces = [*parts[:position], part[:cut], part[cut:], *parts[position + 1 :]]
                    assert run(pieces) == expected, f"cut in {part!r} at {cut}"
        assert run([reply], match_text=True) == expected, "one text with spelled markers"
        assert run(reply, match_text=True) == expected, "single characters with spelled markers"
        for cut in range(len(reply)):
            assert run([reply[:cut], reply[cut:]], match_text=True) == expected, f"spelled markers, cut at {cut}"

    return check


def split_markers(reply: str, markers: Collection[str]) -> list[Piece]:
    """Return the reply with each spelled marker as a control token."""
    parts = re.split("(" + "|".join(map(re.escape, markers)) + ")", reply) if markers else [reply]
    return [ControlToken(part, 1000) if part in markers else part for part in parts if part]


def characters(piece: Piece) -> Iterable[Piece]:
    """Return a text's characters; a control token stays whole."""
    return [piece] if isinstance(piece, ControlToken) else list(piece)


@pytest.fixture(scope="session")
def result_of() -> Callable[[list[Event]], Result]:
    """Return a function that folds events to content and (name, arguments), without the random ids."""

    def fold_to_values(events: list[Event]) -> Result:
        folded: Folded = fold(events)
        return folded.content, [(call.name, json.loads(call.arguments)) for call in folded.tool_calls]

    return fold_to_values
