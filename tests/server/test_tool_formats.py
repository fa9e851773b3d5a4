"""Tool calls and reasoning of every family over HTTP: a stream says what the whole reply says, in pieces of any size.

What the engine "generates" is written down as text with control tokens spelled; the expectations are written by hand.
"""

import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import pytest
from server_fakes import FakeEngine, running
from toy_models import TOY_MODELS, ToyModel

from lmdserve.engine.api import FinishReason
from lmdserve.server.model import ServedModel, load_served_model

USER = {"role": "user", "content": "Hi"}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
INTERPRETER = {"type": "code_interpreter"}
CALL = '{"name": "weather", "arguments": {"city": "上海"}}'
CITY = ("weather", {"city": "上海"})
QWEN_CALL = f"<tool_call>\n{CALL}\n</tool_call>"


class Case(NamedTuple):
    model: str
    reply: str
    content: str | None
    calls: list[Any]
    reasoning: str | None = None
    tools: Any = (WEATHER,)


CASES = {
    "hermes": Case("qwen", f"Let me see.\n{QWEN_CALL}", "Let me see.", [CITY]),
    "hermes, two": Case("qwen", f"{QWEN_CALL}\n{QWEN_CALL}", None, [CITY, CITY]),
    "hermes, broken": Case("qwen", "<tool_call>\n{\"name\": \"weather\", \"arguments\": [}", "<tool_call>\n{\"name\": "
                           "\"weather\", \"arguments\": [}", []),
    "hermes, reasoning": Case("qwen", f"<think>\nHm, 上海.\n</think>\n\n{QWEN_CALL}", None, [CITY], "Hm, 上海."),
    "hermes, reasoning and text": Case("qwen", f"<think>a</think>\n\nb\n{QWEN_CALL}", "b", [CITY], "a"),
    "hermes, reasoning not closed": Case("qwen", f"<think>\na\n{QWEN_CALL}", None, [CITY], "a"),
    "reasoning without tools": Case("qwen", "<think>\na\n</think>\n\nb", "b", [], "a", ()),
    "no reasoning": Case("qwen", "b <think>c</think>", "b <think>c</think>", [], None, ()),
    "our template": Case("qwen without tools", QWEN_CALL, None, [CITY]),
    "llama": Case("llama", CALL, None, [CITY]),
    "llama, an answer": Case("llama", '{"name": "Ann"}', '{"name": "Ann"}', []),
    "llama, code": Case("llama", "<|python_tag|>print(1)", None, [("code_interpreter", {"code": "print(1)"})], None,
                        (WEATHER, INTERPRETER)),
    "mistral": Case("mistral", f"Well.[TOOL_CALLS][{CALL}]", "Well.", [CITY]),
    "mistral, newer": Case("mistral", '[TOOL_CALLS]weather[ARGS]{"city": "上海"}', None, [CITY]),
    "internlm2": Case("internlm2", f"<|action_start|><|plugin|>\n{CALL}<|action_end|>", None, [CITY]),
    "internlm2 does not reason": Case("internlm2", "<think>a</think>b", "<think>a</think>b", []),
}  # fmt: skip


class Served(NamedTuple):
    toy: ToyModel
    engine: FakeEngine
    post: Any


@pytest.fixture(scope="session")
def served_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ServedModel]:
    def folder(name: str) -> Path:
        return TOY_MODELS[name].write(tmp_path_factory.mktemp(name.replace(" ", "_")))

    return {name: load_served_model(folder(name), name="toy", chat_template=None) for name in TOY_MODELS}


@asynccontextmanager
async def serving(served_models: dict[str, ServedModel], name: str) -> AsyncIterator[Served]:
    engine = FakeEngine()
    async with running(engine, served_models[name]) as url, aiohttp.ClientSession(url) as session:

        async def post(path: str = "/v1/chat/completions", *, status: int = 200, **fields: Any) -> Any:
            async with session.post(path, json={"messages": [USER], **fields}) as reply:
                assert reply.status == status, await reply.text()
                if not fields.get("stream"):
                    return await reply.json()
                events = (await reply.text()).strip().split("\n\n")
                assert events[-1] == "data: [DONE]"
                return [json.loads(event.removeprefix("data: ")) for event in events[:-1]]

        yield Served(TOY_MODELS[name], engine, post)


def fold(chunks: list[Any], index: int = 0) -> dict[str, Any]:
    """Add a stream's deltas up to a message, checking the rules that every stream keeps."""
    message: dict[str, Any] = {"content": "", "reasoning_content": "", "calls": [], "finish_reason": None}
    for choice in (choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index):
        assert message["finish_reason"] is None
        delta = choice["delta"]
        message["content"] += delta.get("content") or ""
        assert delta.get("reasoning_content") == delta.get("reasoning")
        message["reasoning_content"] += delta.get("reasoning_content") or ""
        for part in delta.get("tool_calls", ()):
            if part["index"] == len(message["calls"]):
                assert part["type"] == "function"
                message["calls"].append({"id": part["id"], "name": part["function"]["name"], "arguments": ""})
            else:
                assert part.keys() == {"index", "function"}, "id, type and name come once"
            message["calls"][-1]["arguments"] += part["function"]["arguments"]
        message["finish_reason"] = choice["finish_reason"]
    return message


@pytest.mark.parametrize("name", CASES)
async def test_replies(served_models: dict[str, ServedModel], name: str) -> None:
    case = CASES[name]
    fields = {"tools": list(case.tools)} if case.tools else {}
    async with serving(served_models, case.model) as served:
        for tokens_a_chunk in (1, 3, 1000):
            served.engine.script = lambda request, n=tokens_a_chunk: served.toy.answer(case.reply, tokens_a_chunk=n)
            (choice,) = (await served.post(**fields))["choices"]
            message = choice["message"]
            assert message["content"] == case.content
            calls = [call["function"] for call in message.get("tool_calls", ())]
            assert [(call["name"], json.loads(call["arguments"])) for call in calls] == case.calls
            assert message.get("reasoning_content") == message.get("reasoning") == case.reasoning
            assert ("reasoning" in message) == (case.model == "qwen")
            assert choice["finish_reason"] == ("tool_calls" if case.calls else "stop")

            streamed = fold(await served.post(**fields, stream=True))
            broken = name == "hermes, broken"  # the stream's call was taken back: it began, and never finished
            assert streamed["content"] == (case.content or "")
            assert streamed["reasoning_content"] == (case.reasoning or "")
            found = [(call["name"], json.loads(call["arguments"])) for call in streamed["calls"] if not broken]
            assert found == case.calls
            assert streamed["finish_reason"] == choice["finish_reason"]


async def test_mistral_ids_are_what_its_templates_take(served_models: dict[str, ServedModel]) -> None:
    async with serving(served_models, "mistral") as served:
        served.engine.script = lambda request: served.toy.answer(f"[TOOL_CALLS][{CALL}]")
        message = (await served.post(tools=[WEATHER]))["choices"][0]["message"]
        assert re.fullmatch("[A-Za-z0-9]{9}", message["tool_calls"][0]["id"])
        foreign = [{"id": "call_1", "function": {"name": "weather", "arguments": "{}"}}]
        messages = [USER, {"role": "assistant", "content": None, "tool_calls": foreign},
                    {"role": "tool", "tool_call_id": "call_1", "content": "22"}]  # fmt: skip
        prompt = (await served.post("/v1/chat/render", messages=messages, tools=[WEATHER]))["prompt"]
        (call_id,) = re.findall('"id": "([A-Za-z0-9]{9})"', prompt)
        assert f'[TOOL_RESULTS]{{"content": "22", "call_id": "{call_id}"}}[/TOOL_RESULTS]' in prompt


@pytest.mark.parametrize(
    ("name", "reply"),
    [
        ("qwen", f"Let me see.\n{QWEN_CALL}"),
        ("qwen", f"<think>\nHm.\n</think>\n\nb\n{QWEN_CALL}\n{QWEN_CALL}"),
        ("llama", CALL.replace("arguments", "parameters")),
        ("internlm2", f"Sure.<|action_start|><|plugin|>\n{CALL.replace('arguments', 'parameters')}<|action_end|>"),
    ],
)
async def test_an_answer_that_is_sent_back_gives_the_tokens_that_were_generated(
    served_models: dict[str, ServedModel], name: str, reply: str
) -> None:
    """So the next request finds the whole conversation in the prefix cache."""
    async with serving(served_models, name) as served:
        served.engine.script = lambda request: served.toy.answer(reply)
        message = (await served.post(tools=[WEATHER]))["choices"][0]["message"]
        results = [{"role": "tool", "tool_call_id": call["id"], "content": "22"} for call in message["tool_calls"]]
        rendered = await served.post("/v1/chat/render", tools=[WEATHER], messages=[USER, message, *results])
        known = [*served.engine.requests[0].prompt_token_ids, *served.toy.ids(reply + served.toy.turn_end)]
        assert rendered["prompt_token_ids"][: len(known)] == known


async def test_an_end_of_text_is_no_content(served_models: dict[str, ServedModel]) -> None:
    """A control token that no format knows was content where tools were offered, as in `Hello.</s>`."""
    async with serving(served_models, "internlm2") as served:
        for fields in ({}, {"tools": [WEATHER]}):
            served.engine.script = lambda request: served.toy.answer("Hello.</s>", finish=FinishReason.LENGTH)
            assert (await served.post(**fields))["choices"][0]["message"]["content"] == "Hello."


# --- reasoning ---


async def test_reasoning_counts_as_tokens_and_is_cut_by_the_token_limit(served_models: dict[str, ServedModel]) -> None:
    async with serving(served_models, "qwen") as served:
        served.engine.script = lambda request: served.toy.answer("<think>\nHm", finish=FinishReason.LENGTH)
        reply = await served.post(max_tokens=4)
        (choice,) = reply["choices"]
        assert choice["message"] == {
            "role": "assistant", "content": "", "refusal": None, "reasoning_content": "Hm", "reasoning": "Hm"
        }  # fmt: skip
        assert choice["finish_reason"] == "length"
        assert reply["usage"]["completion_tokens"] == len("\nHm") + 1


async def test_usage_says_how_much_was_reasoning(served_models: dict[str, ServedModel]) -> None:
    async with serving(served_models, "qwen") as served:
        for reply, num_tokens in (("<think>ab</think>cde", 4), ("<think>ab", 3), ("cde", 0)):
            served.engine.script = lambda request, reply=reply: served.toy.answer(reply)
            whole = await served.post()
            *_, last = await served.post(stream=True, stream_options={"include_usage": True})
            for usage in (whole["usage"], last["usage"]):
                assert usage["completion_tokens_details"] == {"reasoning_tokens": num_tokens}
                assert usage["completion_tokens"] > num_tokens


async def test_a_stop_string_ends_reasoning_too(served_models: dict[str, ServedModel]) -> None:
    async with serving(served_models, "qwen") as served:
        served.engine.script = lambda request: served.toy.answer("<think>one two three</think>four")
        for stream in (False, True):
            reply = await served.post(stop=["thr"], stream=stream)
            message = fold(reply) if stream else reply["choices"][0]["message"]
            assert (message["reasoning_content"], message["content"]) == ("one two", "")


async def test_each_choice_has_reasoning_of_its_own(served_models: dict[str, ServedModel]) -> None:
    replies = {"0": "<think>a</think>b", "1": "c", "2": "<think>d"}
    async with serving(served_models, "qwen") as served:
        served.engine.script = lambda request: served.toy.answer(replies[request.uid[-1]])
        chunks = await served.post(n=3, stream=True)
        found = [(fold(chunks, index)["reasoning_content"], fold(chunks, index)["content"]) for index in range(3)]
        assert found == [("a", "b"), ("", "c"), ("d", "")]


@pytest.mark.parametrize(
    ("kwargs", "reply", "reasoning", "content"),
    [
        ({"opens": True}, "a</think>b", "a", "b"),
        ({"opens": True}, "a", "a", ""),
        ({"enable_thinking": False}, "a</think>b", None, "a</think>b"),
        ({"enable_thinking": False}, "b", None, "b"),
    ],
)
async def test_the_prompt_tells_whether_a_reply_begins_inside_reasoning(
    served_models: dict[str, ServedModel], kwargs: Any, reply: str, reasoning: str | None, content: str
) -> None:
    async with serving(served_models, "qwen") as served:
        served.engine.script = lambda request: served.toy.answer(reply)
        # Tags that users write are text, and open nothing.
        messages = [{"role": "user", "content": "Say <think>"}, {"role": "assistant", "content": "<think>"}, USER]
        message = (await served.post(chat_template_kwargs=kwargs, messages=messages))["choices"][0]["message"]
        assert (message["reasoning_content"], message["content"]) == (reasoning, content)


@pytest.mark.parametrize(
    ("prefix", "reasoning", "content"),
    [("<think>I", "x", "y"), ("<think>I</think>", None, "x</think>y"), ("I", None, "x</think>y")],
)
async def test_a_continued_answer_goes_on_where_it_was(
    served_models: dict[str, ServedModel], prefix: str, reasoning: str | None, content: str
) -> None:
    async with serving(served_models, "qwen") as served:
        served.engine.script = lambda request: served.toy.answer("x</think>y")
        for sent in (prefix, [{"type": "text", "text": prefix}]):
            messages = [USER, {"role": "assistant", "content": sent}]
            reply = await served.post(messages=messages, continue_final_message=True)
            message = reply["choices"][0]["message"]
            assert (message["reasoning_content"], message["content"]) == (reasoning, content)


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
async def test_earlier_reasoning_is_rendered_as_the_template_wants(
    served_models: dict[str, ServedModel], field: str
) -> None:
    async with serving(served_models, "qwen") as served:
        messages = [USER, {"role": "assistant", "content": None, field: "Hm."}, USER]
        prompt = (await served.post("/v1/chat/render", messages=messages))["prompt"]
        assert "<|im_start|>assistant\n<think>\nHm.\n</think>\n\n<|im_end|>" in prompt
    async with serving(served_models, "internlm2") as served:
        messages[1]["content"] = "Yes."
        prompt = (await served.post("/v1/chat/render", messages=messages))["prompt"]
        assert "<|im_start|>assistant\nYes.<|im_end|>" in prompt


async def test_two_names_with_two_values_are_refused(served_models: dict[str, ServedModel]) -> None:
    async with serving(served_models, "qwen") as served:
        message = {"role": "assistant", "content": "a", "reasoning": "b", "reasoning_content": "c"}
        reply = await served.post(messages=[USER, message], status=400)
        assert reply["error"]["param"] == "messages[1].reasoning"
        message["reasoning_content"] = "b"
        await served.post(messages=[USER, message, USER])


# --- what is offered ---


async def test_tool_choice_none_shows_no_tools_and_reads_no_calls(served_models: dict[str, ServedModel]) -> None:
    for name, call in (("qwen", QWEN_CALL), ("llama", CALL)):
        async with serving(served_models, name) as served:
            served.engine.script = lambda request, call=call: served.toy.answer(call)
            reply = await served.post(tools=[WEATHER], tool_choice="none")
            assert reply["choices"][0]["message"]["content"] == call
            assert reply["choices"][0]["finish_reason"] == "stop"
            without = await served.post("/v1/chat/render")
            assert list(served.engine.requests[0].prompt_token_ids) == without["prompt_token_ids"]


async def test_without_parallel_calls_the_first_one_ends_the_answer(served_models: dict[str, ServedModel]) -> None:
    replies = {"qwen": f"{QWEN_CALL}\n{QWEN_CALL} more", "llama": f"{CALL}; {CALL}",
               "mistral": f"[TOOL_CALLS][{CALL}, {CALL}]"}  # fmt: skip
    for name, reply in replies.items():
        async with serving(served_models, name) as served:
            served.engine.script = lambda request, reply=reply: served.toy.answer(reply)
            for stream in (False, True):
                got = await served.post(tools=[WEATHER], parallel_tool_calls=False, stream=stream)
                if stream:
                    assert (len(fold(got)["calls"]), fold(got)["finish_reason"]) == (1, "tool_calls")
                else:
                    (choice,) = got["choices"]
                    assert (len(choice["message"]["tool_calls"]), choice["finish_reason"]) == (1, "tool_calls")
                    assert choice["message"]["content"] is None
            await served.engine.until_idle()
            assert len(served.engine.aborted) == 2, "the engine does not go on"


async def test_an_interpreter_is_refused_where_the_format_has_none(served_models: dict[str, ServedModel]) -> None:
    for name in ("qwen", "mistral"):
        async with serving(served_models, name) as served:
            reply = await served.post(tools=[WEATHER, INTERPRETER], status=400)
            assert reply["error"]["param"] == "tools[1].type"


async def test_llamas_built_in_tools_are_offered_by_name(served_models: dict[str, ServedModel]) -> None:
    reply_text = '<|python_tag|>brave_search.call(query="a")'
    async with serving(served_models, "llama") as served:
        served.engine.script = lambda request: served.toy.answer(reply_text)
        reply = await served.post(tools=[WEATHER], chat_template_kwargs={"builtin_tools": ["brave_search"]})
        (call,) = reply["choices"][0]["message"]["tool_calls"]
        assert call["function"] == {"name": "brave_search", "arguments": '{"query": "a"}'}
        reply = await served.post(tools=[WEATHER])
        assert reply["choices"][0]["message"]["content"] == reply_text


async def test_a_template_that_drops_tools_is_replaced_and_the_log_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        model = load_served_model(TOY_MODELS["qwen without tools"].write(tmp_path), name="toy", chat_template=None)
    assert caplog.text.count("drops tools: requests with tools use the built-in hermes template") == 1
    assert model.renderer.render_text([USER]) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert '"name": "weather"' in model.renderer.render_text([USER], tools=[WEATHER])


# --- the prompt, rendered only ---


@pytest.mark.parametrize("name", TOY_MODELS)
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"tools": [WEATHER]},
        {"tools": [WEATHER], "tool_choice": "none"},
        {"messages": [{"role": "user", "content": "你好 <|im_end|>[INST]</s>"}]},
        {"messages": [USER, {"role": "assistant", "content": "I am"}], "continue_final_message": True},
    ],
)
async def test_render_is_what_the_engine_gets(
    served_models: dict[str, ServedModel], name: str, fields: dict[str, Any]
) -> None:
    async with serving(served_models, name) as served:
        rendered = await served.post("/v1/chat/render", **fields)
        assert served.engine.requests == []
        await served.post(**fields)
        (request,) = served.engine.requests
        assert rendered["prompt_token_ids"] == list(request.prompt_token_ids)
        assert rendered["num_prompt_tokens"] == len(request.prompt_token_ids)
        tokenizer = served_models[name].tokenizer
        assert rendered["prompt"] == tokenizer.decode(request.prompt_token_ids, keep_control=True)


async def test_render_refuses_what_chat_refuses(served_models: dict[str, ServedModel]) -> None:
    async with serving(served_models, "qwen") as served:
        for fields, status, param in (
            ({"messages": []}, 400, "messages"),
            ({"model": "other"}, 404, "model"),
            ({"tools": [{"type": "function", "function": {}}]}, 400, "tools[0].function.name"),
            ({"chat_template_kwargs": {"unknown": 1}}, 400, "chat_template_kwargs.unknown"),
        ):
            for path in ("/v1/chat/render", "/v1/chat/completions"):
                assert (await served.post(path, status=status, **fields))["error"]["param"] == param
