"""The REPL: read a message, stream the answer, run its tool calls or ask for their results, until the user leaves.

Works on any `AsyncClient`: `api_client` gives it a server far away, `lmdserve chat` one in its own process. It needs
the main thread, and Ctrl-C for itself: whoever embeds it must not handle SIGINT meanwhile.
"""

from .answer import Answer, stream_answer
from .commands import COMMANDS, Session, run_command
from .conversation import start_conversation
from .display import Display
from .http import AsyncClient
from .interrupt import run_interruptible
from .options import ReplOptions
from .prompt import LineReader
from .settings import SettingError
from .wire import ClientError, Json

NOT_RUN = "not run"


async def run_repl(client: AsyncClient, *, options: ReplOptions) -> int:
    """Talk until the user leaves and return 0; return 1 when there is nothing to talk to."""
    display = Display(has_color=options.has_color)
    try:
        conversation = await start_conversation(client, options)
    except (ClientError, SettingError) as error:
        display.error(str(error))
        return 1
    reader = LineReader(history_path=options.history_path, commands=list(COMMANDS), has_color=options.has_color)
    if reader.history_problem:
        display.notice(reader.history_problem)
    display.notice(f"{conversation.model} at {client.base_url} · /help lists commands, Ctrl-D leaves")
    await _Repl(Session(client, conversation, display), reader).run()
    return 0


class _NothingToKeepError(Exception):
    """An answer ended, or was stopped, before its first word."""


class _Repl:
    def __init__(self, session: Session, reader: LineReader) -> None:
        self._session = session
        self._reader = reader

    async def run(self) -> None:
        while not self._session.is_leaving:
            text = await self._reader.read_message()
            if text is None:
                return
            try:
                await self._take(text)
            except (ClientError, SettingError) as error:
                self._session.display.error(str(error))
            except _NothingToKeepError:
                continue

    async def _take(self, text: str) -> None:
        if not text.strip():
            return
        if text.startswith("/") and not text.startswith("//"):
            if not await run_interruptible(run_command(self._session, text)):
                self._session.display.notice("stopped")
            return
        await self._take_turn(text[1:] if text.startswith("//") else text)

    async def _take_turn(self, text: str) -> None:
        """Send a message and let the model answer, with as many rounds of tool calls as it and the user want."""
        messages = self._session.conversation.messages
        turn_start = len(messages)
        messages.append({"role": "user", "content": text})
        try:
            while (calls := await self._answer()) and await self._add_results(calls):
                pass
        except (ClientError, _NothingToKeepError):
            del messages[turn_start:]
            self._session.display.notice("this turn is not part of the conversation; Up brings your message back")
            raise

    async def _answer(self) -> list[Json]:
        """Stream one answer, keep it in the conversation, and return its tool calls."""
        session, answer = self._session, Answer()
        is_finished = await run_interruptible(
            stream_answer(session.client, session.conversation, answer, session.display.delta)
        )
        session.display.end_answer(answer, was_stopped=not is_finished)
        message = answer.message()
        if message is None:
            raise _NothingToKeepError
        session.conversation.messages.append(message)
        return answer.tool_calls()

    async def _add_results(self, calls: list[Json]) -> bool:
        """Run each call, or ask the user for its result; whether one was given, so that the model should go on.

        Each call gets a result, if only "not run": servers refuse a conversation with an unanswered call.
        """
        results = [await self._result(call["function"]) for call in calls]
        for call, result in zip(calls, results, strict=True):
            self._session.conversation.messages.append(
                {"role": "tool", "tool_call_id": call["id"], "content": NOT_RUN if result is None else result}
            )
        return any(result is not None for result in results)

    async def _result(self, called: Json) -> str | None:
        """Return the result of a call, or None when there is to be none; Ctrl-C stops a function, too."""
        tool = self._session.conversation.functions.get(called["name"])
        if tool is None:
            return await self._reader.read_result(called["name"])
        results: list[str] = []

        async def run() -> None:
            results.append(await tool.run(called["arguments"]))

        await run_interruptible(run())
        self._session.display.notice(f"{called['name']} gave {results[0]}" if results else f"{called['name']} stopped")
        return results[0] if results else None
