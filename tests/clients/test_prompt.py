"""When Enter sends, what a block means, what Tab offers."""

import pytest
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document

from lmdserve.clients.prompt import CommandCompleter, needs_more, unquote


@pytest.mark.parametrize(
    ("text", "is_unfinished"),
    [
        ("hi", False),
        ("hi\\", True),
        ("two\\\nlines", False),
        ('"""', True),
        ('""""', True),
        ('"""""', True),
        ('""""""', False),
        ('"""\ntext', True),
        ('"""\ntext\n"""', False),
        ('"""\ntext\n"""  ', False),
        ('"""\ntext\\', True),
        ('say """', False),
    ],
)
def test_enter_sends_only_what_is_finished(text: str, is_unfinished: bool) -> None:
    assert needs_more(text) is is_unfinished


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hi", "hi"),
        ('"""hi"""', "hi"),
        ('"""\n\nhi\n\n"""\n', "\nhi\n"),
        ('""""""', ""),
        ('"""a""" and """b"""', 'a""" and """b'),
        ('"hi"', '"hi"'),
    ],
)
def test_a_block_loses_its_quotes(text: str, message: str) -> None:
    assert unquote(text) == message


@pytest.mark.parametrize(
    ("text", "offered"),
    [("/s", ["/system", "/save"]), ("/", ["/help", "/system", "/save"]), ("/x", []), ("s", []), ("", [])],
)
def test_tab_offers_commands(text: str, offered: list[str]) -> None:
    completer = CommandCompleter(["/help", "/system", "/save"])
    found = list(completer.get_completions(Document(text), CompleteEvent()))
    assert [completion.text for completion in found] == offered
    assert all(completion.start_position == -len(text) for completion in found)
