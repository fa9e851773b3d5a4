"""Each command, through the dispatcher, with a scripted server and a real display."""

import json
from pathlib import Path
from typing import Any

import pytest

from lmdserve.clients.commands import COMMANDS, Session, run_command
from lmdserve.clients.conversation import Conversation
from lmdserve.clients.display import Display
from lmdserve.clients.http import AsyncClient
from lmdserve.clients.settings import SettingError

TURN = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


@pytest.fixture
def session() -> Session:
    conversation = Conversation(model="demo", messages=[*TURN])
    return Session(AsyncClient("127.0.0.1:1"), conversation, Display(has_color=False))


@pytest.fixture
def shown(capsys: pytest.CaptureFixture[str]) -> Any:
    return lambda: capsys.readouterr().out


async def test_help_names_every_command(session: Session, shown: Any) -> None:
    await run_command(session, "/help")
    text = shown()
    assert all(name in text and " ".join(command.meaning.split()[:3]) in text for name, command in COMMANDS.items())
    assert "Esc Enter" in text


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("/sytem x", "unknown command /sytem; did you mean '/system'"),
        ("/etc/passwd", "// sends a message that begins with /"),
        ("/help me", "/help takes no argument"),
        ("/save", "/save needs a file name"),
        ("/load  ", "/load needs a file name"),
        ("/load /nowhere.json", "cannot read /nowhere.json"),
        ("/params temprature=1", "did you mean 'temperature'"),
        ("/tools /nowhere.json", "cannot read /nowhere.json"),
    ],
)
async def test_a_wrong_line_is_explained_and_changes_nothing(session: Session, line: str, expected: str) -> None:
    with pytest.raises(SettingError) as caught:
        await run_command(session, line)
    assert expected in str(caught.value)
    assert session.conversation == Conversation(model="demo", messages=TURN)


async def test_reset_forgets_messages_only(session: Session) -> None:
    session.conversation.system = "Be brief."
    session.conversation.params = {"seed": 1}
    await run_command(session, "/reset")
    assert session.conversation == Conversation(model="demo", system="Be brief.", params={"seed": 1})


async def test_system_is_set_shown_and_removed(session: Session, shown: Any) -> None:
    await run_command(session, "/system Be  brief, please.")
    assert session.conversation.system == "Be  brief, please."
    await run_command(session, "/system")
    assert shown() == "system message: Be  brief, please.\n" * 2
    await run_command(session, "/system off")
    assert session.conversation.system is None


async def test_params_are_set_unset_shown_and_reset(session: Session, shown: Any) -> None:
    await run_command(session, "/params temperature=0.8 top_p=0.8 max_tokens=64")
    assert session.conversation.params == {"temperature": 0.8, "top_p": 0.8, "max_tokens": 64}
    await run_command(session, "/params top_p=")
    shown()
    await run_command(session, "/params")
    assert [line.split() for line in shown().splitlines()] == [["temperature", "0.8"], ["max_tokens", "64"]]
    await run_command(session, "/params reset")
    assert session.conversation.params == {}


async def test_models_are_listed_and_chosen(session: Session, fake_server: Any, shown: Any) -> None:
    async with AsyncClient(fake_server.url) as session.client:
        await run_command(session, "/model other")
        assert shown() == "  demo\n* other\n"
        with pytest.raises(SettingError, match="offers no model 'demi'; did you mean 'demo'"):
            await run_command(session, "/model demi")
    assert session.conversation.model == "other"


async def test_tools_are_loaded_listed_and_removed(session: Session, tmp_path: Path, shown: Any) -> None:
    path = tmp_path / "my tools.json"
    path.write_text(json.dumps([{"name": "add", "description": "Add two numbers"}, {"type": "code_interpreter"}]))
    await run_command(session, f"/tools {path}")
    assert [line.split() for line in shown().splitlines()] == [["add", "Add", "two", "numbers"], ["code_interpreter"]]
    await run_command(session, "/tools off")
    assert session.conversation.tools == []
    await run_command(session, "/tools")
    assert "no tools offered" in shown()


async def test_a_conversation_is_saved_reloaded_and_saved_again(session: Session, tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    await run_command(session, f"/save {path}")
    await run_command(session, "/reset")
    await run_command(session, f"/load {path}")
    assert session.conversation.messages == TURN
    session.conversation.messages.append({"role": "user", "content": "more"})
    await run_command(session, f"/save {path}")
    assert len(json.loads(path.read_text())["messages"]) == 3


async def test_a_file_of_someone_else_is_not_replaced(session: Session, tmp_path: Path) -> None:
    path = tmp_path / "thesis.txt"
    path.write_text("precious")
    with pytest.raises(SettingError, match="exists and was not written here"):
        await run_command(session, f"/save {path}")
    assert path.read_text() == "precious"


async def test_exit_leaves(session: Session) -> None:
    assert not session.is_leaving
    await run_command(session, "/exit")
    assert session.is_leaving
