"""One message in, its answer out: what `api_client` does in a pipe."""

import json
import sys

from .answer import Answer, stream_answer
from .conversation import start_conversation
from .display import printable
from .http import AsyncClient
from .options import ReplOptions
from .pipe import silence_stdout
from .settings import SettingError
from .wire import ChatDelta, ClientError


async def answer_once(client: AsyncClient, *, options: ReplOptions, message: str) -> int:
    """Print the answer, and nothing else, on standard output; errors go to standard error with exit status 1.

    A tool call is printed as one line of JSON: nobody is there to ask for its result.
    """
    answer = Answer()
    try:
        if not message.strip():
            raise SettingError("standard input holds no message; try: echo hi | api_client")
        conversation = await start_conversation(client, options)
        conversation.messages.append({"role": "user", "content": message.strip("\n")})
        await stream_answer(client, conversation, answer, _show)
    except (ClientError, SettingError) as error:
        _end_line(answer)
        print(f"api_client: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        silence_stdout()
        return 1
    _end_line(answer)
    for call in answer.tool_calls():
        function = call["function"]
        line = {"name": function["name"], "arguments": json.loads(function["arguments"] or "{}")}
        print(json.dumps(line, ensure_ascii=False))
    return 0


def _show(delta: ChatDelta) -> None:
    # A pipe gets the model's exact words, a terminal only what cannot steer it.
    sys.stdout.write(printable(delta.content) if sys.stdout.isatty() else delta.content)
    sys.stdout.flush()


def _end_line(answer: Answer) -> None:
    content = answer.builder.reply().message["content"]
    if content and not content.endswith("\n"):
        print()
