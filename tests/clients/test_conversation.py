"""What a conversation sends, and that a file brings it back whole or not at all."""

import json
from pathlib import Path
from typing import Any

import pytest

from lmdserve.clients.conversation import Conversation, start_conversation
from lmdserve.clients.http import AsyncClient
from lmdserve.clients.options import ReplOptions
from lmdserve.clients.settings import SettingError
from lmdserve.clients.wire import ServerError

CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": "{}"}}
MESSAGES: list[dict[str, Any]] = [
    {"role": "user", "content": "帮我"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": "8"},
    {"role": "assistant", "content": "8."},
]
TOOLS = [{"type": "function", "function": {"name": "add"}}]


def full_conversation() -> Conversation:
    return Conversation(model="demo", system="Be brief.", params={"top_p": 0.5}, tools=[*TOOLS], messages=[*MESSAGES])


def test_a_request_has_the_system_message_first_and_only_what_is_set() -> None:
    conversation = full_conversation()
    assert conversation.request_messages() == [{"role": "system", "content": "Be brief."}, *MESSAGES]
    assert conversation.request_params() == {"top_p": 0.5, "tools": TOOLS}
    bare = Conversation(model="demo")
    assert (bare.request_messages(), bare.request_params()) == ([], {})


def test_parameters_are_merged_and_none_removes() -> None:
    conversation = full_conversation()
    conversation.set_params({"seed": 1, "top_p": None, "top_k": None})
    assert conversation.params == {"seed": 1}


def test_a_saved_conversation_comes_back_but_for_the_model(tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    full_conversation().save(path)
    loaded = Conversation(model="other")
    loaded.load(path)
    loaded.model, expected = "demo", full_conversation()
    assert loaded == expected
    assert "帮我" in path.read_text(encoding="utf-8")
    assert [file.name for file in tmp_path.iterdir()] == ["talk.json"]


def test_a_list_of_messages_is_a_conversation(tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    path.write_text(json.dumps([{"role": "system", "content": "Be brief."}, *MESSAGES]))
    conversation = Conversation(model="demo")
    conversation.load(path)
    assert conversation == Conversation(model="demo", system="Be brief.", messages=[*MESSAGES])


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "5",
        "{}",
        '{"messages": 5}',
        "[5]",
        '[{"content": "x"}]',
        '[{"role": "robot", "content": "x"}]',
        '[{"role": "user", "content": 5}]',
        '[{"role": "system", "content": ["x"]}]',
        '{"messages": [], "system": 5}',
        '{"messages": [], "params": []}',
        '{"messages": [], "params": {"temprature": 1}}',
        '{"messages": [], "params": {"seed": "x"}}',
        '{"messages": [], "tools": {}}',
        '{"messages": [], "tools": [{}]}',
    ],
)
def test_an_invalid_file_changes_nothing(content: str, tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    path.write_text(content)
    conversation = full_conversation()
    with pytest.raises(SettingError):
        conversation.load(path)
    assert conversation == full_conversation()


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"cannot write .*missing/talk\.json: No such file"):
        full_conversation().save(tmp_path / "missing" / "talk.json")


async def test_a_missing_key_is_said_with_how_to_give_one() -> None:
    async def refuse() -> list[str]:
        raise ServerError("no API key was sent", status=401)

    async with AsyncClient("http://127.0.0.1:1") as client:
        client.models = refuse  # type: ignore[method-assign]
        with pytest.raises(SettingError, match=r"HTTP 401: no API key was sent \(--api-key or LMDSERVE_API_KEY"):
            await start_conversation(client, ReplOptions())
