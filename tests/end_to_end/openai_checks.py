"""What an OpenAI SDK user does first, as a program: `python openai_checks.py http://127.0.0.1:23333`.

Runs under any SDK version, so that the same checks cover the current one and its predecessor.
"""

import json
import sys
from typing import Any

import openai

ADD_AND_MUL = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"Compute the {what} of two numbers",
            "parameters": {
                "type": "object",
                "properties": {
                    "a": {"type": "int", "description": "A number"},
                    "b": {"type": "int", "description": "A number"},
                },
                "required": ["a", "b"],
            },
        },
    }
    for name, what in (("add", "sum"), ("mul", "product"))
]


def add(a: int, b: int) -> int:
    return a + b


def mul(a: int, b: int) -> int:
    return a * b


def complete(client: openai.OpenAI, *, stream: bool, **parameters: Any) -> dict[str, Any]:
    """One chat completion folded to {content, tool_calls, finish_reason}, the same for a stream and a whole reply."""
    if not stream:
        choice = client.chat.completions.create(**parameters).choices[0]
        calls = [call.function for call in choice.message.tool_calls or []]
        tool_calls = [{"name": call.name, "arguments": call.arguments} for call in calls]
        return {"content": choice.message.content, "tool_calls": tool_calls, "finish_reason": choice.finish_reason}
    content, calls_by_index, finish_reason, roles = "", {}, None, []
    for chunk in client.chat.completions.create(stream=True, **parameters):
        for choice in chunk.choices:
            assert finish_reason is None, "a choice chunk came after finish_reason"
            content += choice.delta.content or ""
            roles += [choice.delta.role] if choice.delta.role else []
            for delta in choice.delta.tool_calls or []:
                call = calls_by_index.setdefault(delta.index, {"name": delta.function.name, "arguments": ""})
                call["arguments"] += delta.function.arguments or ""
            finish_reason = choice.finish_reason
    assert roles == ["assistant"], roles
    return {"content": content or None, "tool_calls": list(calls_by_index.values()), "finish_reason": finish_reason}


def check_story(client: openai.OpenAI, model: str, *, stream: bool) -> str:
    """A Chinese story about a fox and a watermelon names both."""
    messages = [
        {"role": "system", "content": "你是一个友好的小助手，负责解决问题."},
        {"role": "user", "content": "帮我讲述一个关于狐狸和西瓜的小故事"},
    ]
    reply = complete(client, stream=stream, model=model, messages=messages, temperature=0.8, top_p=0.8)
    assert reply["finish_reason"] == "stop", reply
    assert "狐狸" in reply["content"], reply
    assert "西瓜" in reply["content"], reply
    assert len(reply["content"]) > 40, reply
    return str(reply["content"])


def check_two_step_call(client: openai.OpenAI, model: str, *, stream: bool) -> int:
    """(3+5)*2 takes two calls; each is executed from its name and arguments, the second on the first one's result."""
    messages: list[Any] = [{"role": "user", "content": "Compute (3+5)*2"}]
    parameters = {"model": model, "tools": ADD_AND_MUL, "temperature": 0.8, "top_p": 0.8, "stream": stream}
    first = complete(client, messages=messages, **parameters)
    assert first["finish_reason"] == "tool_calls", first
    (call,) = first["tool_calls"]
    first_value = eval(f"{call['name']}(**{json.loads(call['arguments'])})")
    assert first_value == 8, first
    tool_call = {"id": "call_1", "type": "function", "function": call}
    messages.append({"role": "assistant", "content": first["content"], "tool_calls": [tool_call]})
    messages.append({"role": "environment", "content": f"3+5={first_value}", "name": "plugin"})
    second = complete(client, messages=messages, **parameters)
    assert second["finish_reason"] == "tool_calls", second
    (call,) = second["tool_calls"]
    return int(eval(f"{call['name']}(**{json.loads(call['arguments'])})"))


def main(base_url: str) -> None:
    client = openai.OpenAI(base_url=f"{base_url}/v1", api_key="none", max_retries=0)
    model = client.models.list().data[0].id
    for stream in (False, True):
        print(check_story(client, model, stream=stream))
        value = check_two_step_call(client, model, stream=stream)
        assert value == 16, value
    print(f"openai {openai.__version__}: all checks passed")


if __name__ == "__main__":
    main(sys.argv[1])
