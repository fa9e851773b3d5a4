"""Fixtures of tool calling: what a parser is run on, and how its result is written down for comparison."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from lmdserve.tools.api import Event, Folded, Piece, fold
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
def result_of() -> Callable[[list[Event]], Result]:
    """Return a function that folds events to content and (name, arguments), without the random ids."""

    def fold_to_values(events: list[Event]) -> Result:
        folded: Folded = fold(events)
        return folded.content, [(call.name, json.loads(call.arguments)) for call in folded.tool_calls]

    return fold_to_values
