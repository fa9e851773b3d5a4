"""Scores a served model on held-out dialogues: `python -m lmdserve.demo.evaluate http://127.0.0.1:23333`.

It speaks the OpenAI API, so that what it measures is what a client gets: templates, engine, sampling and tool parser
included. `--cases` are drawn with names and values that training never saw; the fixed checks are the conversations
that the documentation shows.
"""

import argparse
import asyncio
import json
from typing import Any

import aiohttp

from .corpus.dialogue import Call, openai_messages, openai_tools
from .scoring import Case, Verdict, held_out_cases, judge, table

MAX_TOKENS = 320
STORY_SYSTEM = "你是一个友好的小助手，负责解决问题."
STORY_REQUEST = "帮我讲述一个关于狐狸和西瓜的小故事"
NUM_STORIES = 20

Reply = tuple[str, list[Call] | None]  # content, and calls: None when an argument text is no JSON


class Client:
    """Sends chats, so many at a time."""

    def __init__(self, session: aiohttp.ClientSession, url: str, num_concurrent: int) -> None:
        self._session = session
        self._url = url.rstrip("/").removesuffix("/v1") + "/v1"
        self._slots = asyncio.Semaphore(num_concurrent)
        self._model = ""

    async def connect(self) -> None:
        """Learn the model's name."""
        async with self._session.get(f"{self._url}/models") as response:
            response.raise_for_status()
            self._model = (await response.json())["data"][0]["id"]

    async def chat(self, messages: list[Any], **options: Any) -> Reply:
        """Return the answer to one conversation."""
        body = {"model": self._model, "messages": messages, "max_tokens": MAX_TOKENS, **options}
        async with self._slots, self._session.post(f"{self._url}/chat/completions", json=body) as response:
            if response.status != 200:
                raise RuntimeError(f"the server answered {response.status}: {await response.text()}")
            message = (await response.json())["choices"][0]["message"]
        return message.get("content") or "", _calls(message.get("tool_calls") or [])


def _calls(tool_calls: list[Any]) -> list[Call] | None:
    try:
        functions = [call["function"] for call in tool_calls]
        return [Call(function["name"], json.loads(function["arguments"])) for function in functions]
    except ValueError:
        return None


async def answer_case(client: Client, case: Case) -> Verdict:
    """Ask one held-out case and judge the answer."""
    content, calls = await client.chat(openai_messages(list(case.turns)), tools=openai_tools(case.tools), temperature=0)
    return judge(case, content, calls)


async def check_stories(client: Client) -> str:
    """Sample the same story often; each must name both things and come to an end."""
    messages = [{"role": "system", "content": STORY_SYSTEM}, {"role": "user", "content": STORY_REQUEST}]
    replies = await asyncio.gather(
        *(client.chat(messages, temperature=0.8, top_p=0.8, seed=seed) for seed in range(NUM_STORIES))
    )
    good = sum("狐狸" in text and "西瓜" in text and text.endswith("。") for text, _ in replies)
    return f"stories about the fox and the watermelon: {good} of {NUM_STORIES}"


async def check_sum(client: Client) -> str:
    """Work out (3+5)*2 through two tools whose parameters have the type `int`."""
    tools = [_binary_tool("add", "Add two numbers"), _binary_tool("mul", "Multiply two numbers")]
    functions = {"add": lambda a, b: a + b, "mul": lambda a, b: a * b}
    messages: list[Any] = [{"role": "user", "content": "Compute (3+5)*2"}]
    value = 0
    for sign in "+*":
        _, calls = await client.chat(messages, tools=tools, temperature=0)
        if not calls:
            return "(3+5)*2 through add and mul: no call"
        call, numbers = calls[0], list(calls[0].arguments.values())
        value = functions[call.name](*numbers)
        arguments = json.dumps(call.arguments)
        function = {"name": call.name, "arguments": arguments}
        messages.append({"role": "assistant", "tool_calls": [{"id": sign, "type": "function", "function": function}]})
        result = f"{numbers[0]}{sign}{numbers[1]}={value}"
        messages.append({"role": "environment", "name": "plugin", "content": result})
    text, _ = await client.chat(messages, tools=tools, temperature=0)
    return f"(3+5)*2 through add and mul: value {value}, answered: {text}"


def _binary_tool(name: str, description: str) -> Any:
    properties = {parameter: {"type": "int", "description": "A number"} for parameter in ("a", "b")}
    parameters = {"type": "object", "properties": properties, "required": ["a", "b"]}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


async def evaluate(options: argparse.Namespace) -> None:
    """Run everything against one server and print it."""
    headers = {"Authorization": f"Bearer {options.api_key}"} if options.api_key else {}
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(headers=headers, timeout=timeout) as session:
        client = Client(session, options.url, options.concurrency)
        await client.connect()
        print(await check_sum(client))
        print(await check_stories(client))
        cases = held_out_cases(options.cases, options.seed)
        verdicts = await asyncio.gather(*(answer_case(client, case) for case in cases))
    print(table(list(verdicts)))
    if options.failures:
        for verdict in verdicts:
            if not verdict.right:
                print(verdict.report())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url", nargs="?", default="http://127.0.0.1:23333")
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=2, help="of the held-out dialogues")
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--api-key")
    parser.add_argument("--failures", action="store_true", help="show every wrong answer as a line of JSON")
    options = parser.parse_args()
    try:
        asyncio.run(evaluate(options))
    except aiohttp.ClientConnectorError:
        parser.exit(2, f"no server answers at {options.url}; start one with `make serve`, or give its URL\n")


if __name__ == "__main__":
    main()
