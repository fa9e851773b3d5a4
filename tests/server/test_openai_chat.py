"""POST /v1/chat/completions through the real openai SDK: what a client gets, whole and streamed."""

import json
import threading
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import openai
import pytest
from server_fakes import CONTROL_IDS, IM_END, SESSION_LEN, FakeEngine, answer, text_ids, with_logprobs

from lmdserve.engine.api import FinishReason, Request
from lmdserve.server.chat import Prompt
from lmdserve.server.model import ServedModel

USER = [{"role": "user", "content": "Hi"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "str"}}, "required": ["city"]},
    },
}
CALL = '<|action_start|><|plugin|>\n{"name": "get_weather", "parameters": {"city": "上海"}}<|action_end|>'


@pytest.fixture
async def client(url: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as sdk:
        yield sdk


async def streamed(client: openai.AsyncOpenAI, **fields: Any) -> list[Any]:
    fields = {"model": "toy", "messages": USER, **fields}
    return [chunk async for chunk in await client.chat.completions.create(stream=True, **fields)]


def fold(chunks: list[Any], index: int = 0) -> dict[str, Any]:
    """Add a stream's deltas up, checking the rules every stream keeps."""
    content, calls, finish_reason, roles = "", {}, None, []
    for choice in (choice for chunk in chunks for choice in chunk.choices if choice.index == index):
        assert finish_reason is None, "a choice chunk came after finish_reason"
        content += choice.delta.content or ""
        roles += [choice.delta.role] if choice.delta.role else []
        for delta in choice.delta.tool_calls or []:
            call = calls.setdefault(delta.index, {"id": delta.id, "name": delta.function.name, "arguments": ""})
            call["arguments"] += delta.function.arguments
        finish_reason = choice.finish_reason
    assert roles == ["assistant"]
    return {"content": content, "calls": list(calls.values()), "finish_reason": finish_reason}


async def test_a_whole_reply(client: openai.AsyncOpenAI, engine: FakeEngine) -> None:
    engine.script = lambda request: answer("Grüße, 狐狸!", num_cached_tokens=3)
    reply = await client.chat.completions.create(model="toy", messages=USER)
    assert reply.object == "chat.completion"
    assert reply.model == "toy"
    assert reply.id.startswith("chatcmpl-")
    (choice,) = reply.choices
    assert choice.message.role == "assistant"
    assert choice.message.content == "Grüße, 狐狸!"
    assert choice.message.tool_calls is None
    assert choice.finish_reason == "stop"
    assert choice.logprobs is None
    num_prompt_tokens = len(engine.requests[0].prompt_token_ids)
    num_completion_tokens = len("Grüße, 狐狸!".encode()) + 1
    assert reply.usage.prompt_tokens == num_prompt_tokens
    assert reply.usage.completion_tokens == num_completion_tokens
    assert reply.usage.total_tokens == num_prompt_tokens + num_completion_tokens
    assert reply.usage.prompt_tokens_details.cached_tokens == 3


async def test_the_engine_gets_the_rendered_prompt_and_every_parameter(
    client: openai.AsyncOpenAI, engine: FakeEngine
) -> None:
    await client.chat.completions.create(
        model="toy",
        messages=USER,
        temperature=0.5,
        top_p=0.25,
        seed=-1,
        presence_penalty=1.5,
        frequency_penalty=-1.5,
        logit_bias={"42": 7},
        max_completion_tokens=11,
        logprobs=True,
        top_logprobs=4,
        extra_body={
            "top_k": 5,
            "min_p": 0.125,
            "repetition_penalty": 1.25,
            "stop_token_ids": [9],
            "ignore_eos": True,
            "min_tokens": 2,
            "deterministic": True,
        },
    )
    (request,) = engine.requests
    assert list(request.prompt_token_ids) == text_ids("<s><|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    sampling = request.sampling
    assert sampling.temperature == 0.5
    assert sampling.top_p == 0.25
    assert sampling.top_k == 5
    assert sampling.min_p == 0.125
    assert sampling.seed == 2**63 - 1
    assert sampling.repetition_penalty == 1.25
    assert sampling.presence_penalty == 1.5
    assert sampling.frequency_penalty == -1.5
    assert sampling.logit_bias == {42: 7.0}
    assert sampling.max_tokens == 11
    assert sampling.min_tokens == 2
    assert sampling.stop_token_ids == {9}
    assert sampling.ignore_eos
    assert sampling.num_logprobs == 4
    assert request.deterministic


async def test_defaults_come_from_the_model_then_from_openai(client: openai.AsyncOpenAI, engine: FakeEngine) -> None:
    await client.chat.completions.create(model="toy", messages=USER)
    sampling = engine.requests[0].sampling
    assert (sampling.temperature, sampling.top_k) == (0.75, 40)  # the folder's generation_config.json
    assert (sampling.top_p, sampling.min_p, sampling.repetition_penalty) == (1.0, 0.0, 1.0)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.seed) == (0.0, 0.0, None)
    assert sampling.max_tokens == SESSION_LEN - len(engine.requests[0].prompt_token_ids)
    assert sampling.stop_token_ids == {IM_END}
    assert sampling.num_logprobs is None
    assert not engine.requests[0].deterministic


async def test_temperature_zero_and_top_k_minus_one_are_kept(client: openai.AsyncOpenAI, engine: FakeEngine) -> None:
    await client.chat.completions.create(model="toy", messages=USER, temperature=0, extra_body={"top_k": -1})
    assert engine.requests[0].sampling.temperature == 0.0
    assert engine.requests[0].sampling.top_k == 0


@pytest.mark.parametrize("tokens_a_chunk", [1, 2, 5, 100])
async def test_a_stream_says_what_the_whole_reply_says(
    client: openai.AsyncOpenAI, engine: FakeEngine, tokens_a_chunk: int
) -> None:
    engine.script = lambda request: answer("狐狸 and 西瓜 🦊", tokens_a_chunk=tokens_a_chunk)
    chunks = await streamed(client)
    assert fold(chunks) == {"content": "狐狸 and 西瓜 🦊", "calls": [], "finish_reason": "stop"}
    assert "�" not in "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert all(chunk.object == "chat.completion.chunk" and chunk.usage is None for chunk in chunks)
    assert chunks[0].choices[0].delta.content == ""
    assert chunks[-1].choices[0].delta.content is None


async def test_usage_comes_last_and_alone_when_asked_for(client: openai.AsyncOpenAI) -> None:
    chunks = await streamed(client, stream_options={"include_usage": True})
    *others, last = chunks
    assert last.choices == []
    assert last.usage.completion_tokens == len("Hello!") + 1
    assert last.usage.total_tokens == last.usage.prompt_tokens + last.usage.completion_tokens
    assert all(chunk.usage is None and "usage" in chunk.model_fields_set for chunk in others)


async def test_continuous_usage_counts_up(client: openai.AsyncOpenAI) -> None:
    chunks = await streamed(client, stream_options={"continuous_usage_stats": True})
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == [1, 1, 2, 3, 4, 5, 6, 7]  # the first token brings the role along
    assert all(chunk.choices for chunk in chunks)


async def test_length_is_told_apart_from_stop(client: openai.AsyncOpenAI, engine: FakeEngine) -> None:
    engine.script = lambda request: answer("cut of", finish=FinishReason.LENGTH)
    reply = await client.chat.completions.create(model="toy", messages=USER, max_tokens=6)
    assert (reply.choices[0].message.content, reply.choices[0].finish_reason) == ("cut of", "length")
    assert fold(await streamed(client, max_tokens=6))["finish_reason"] == "length"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("stop", "expected"), [("lo w", "Hel"), (["zzz", "wor"], "Hello "), (["!"], "Hello world"), (["Hello"], "")]
)
async def test_stop_strings_end_the_text_and_free_the_engine(
    client: openai.AsyncOpenAI, engine: FakeEngine, stop: Any, expected: str, stream: bool
) -> None:
    engine.script = lambda request: answer("Hello world! And much more")
    if stream:
        result = fold(await streamed(client, stop=stop))
    else:
        choice = (await client.chat.completions.create(model="toy", messages=USER, stop=stop)).choices[0]
        result = {"content": choice.message.content, "calls": [], "finish_reason": choice.finish_reason}
    assert result == {"content": expected, "calls": [], "finish_reason": "stop"}
    assert engine.aborted == [engine.requests[0].uid]
    assert not engine.live


async def test_text_held_as_a_possible_stop_string_comes_out_at_the_end(
    client: openai.AsyncOpenAI, engine: FakeEngine
) -> None:
    engine.script = lambda request: answer("Hello wor", tokens_a_chunk=4)
    assert fold(await streamed(client, stop="world"))["content"] == "Hello wor"


async def test_a_stop_string_counts_only_after_min_tokens(client: openai.AsyncOpenAI, engine: FakeEngine) -> None:
    engine.script = lambda request: answer("a.b.c.d")
    reply = await client.chat.completions.create(model="toy", messages=USER, stop=".", extra_body={"min_tokens": 3})
    assert reply.choices[0].message.content == "a.b"


async def test_a_stop_string_that_is_a_control_token_stops_at_it(
    client: openai.AsyncOpenAI, engine: FakeEngine
) -> None:
    await client.chat.completions.create(model="toy", messages=USER, stop=["<|action_end|>"])
    assert engine.requests[0].sampling.stop_token_ids == {IM_END, CONTROL_IDS["<|action_end|>"]}


async def test_a_text_token_among_stop_token_ids_is_no_part_of_the_answer(
    client: openai.AsyncOpenAI, engine: FakeEngine
) -> None:
    ids = text_ids("one;")
    engine.script = lambda request: [next(iter(answer("one;", finish=FinishReason.LENGTH, tokens_a_chunk=4)))._replace(
        token_ids=tuple(ids), finish_reason=FinishReason.STOP)]  # fmt: skip
    reply = await client.chat.completions.create(model="toy", messages=USER, extra_body={"stop_token_ids": [ids[-1]]})
    assert reply.choices[0].message.content == "one"
    assert reply.usage.completion_tokens == 4


async def test_control_tokens_never_show(client: openai.AsyncOpenAI, engine: FakeEngine) -> None:
    engine.script = lambda request: answer("a<|plugin|>b</s>c", finish=FinishReason.LENGTH)
    assert fold(await streamed(client, extra_body={"ignore_eos": True}))["content"] == "abc"


async def test_n_choices_have_their_own_index_seed_and_end(client: openai.AsyncOpenAI, engine: FakeEngine) -> None:
    def script(request: Request) -> Any:
        number = request.sampling.seed - 7
        return answer(f"choice {number}" + "!" * number, num_cached_tokens=10 * number)

    engine.script = script
    reply = await client.chat.completions.create(model="toy", messages=USER, n=3, seed=7)
    expected = ["choice 0", "choice 1!", "choice 2!!"]
    assert [choice.message.content for choice in reply.choices] == expected
    assert [choice.index for choice in reply.choices] == [0, 1, 2]
    assert reply.usage.prompt_tokens == len(engine.requests[0].prompt_token_ids)
    assert reply.usage.completion_tokens == sum(map(len, expected)) + 3
    assert reply.usage.prompt_tokens_details.cached_tokens == 0  # as the first choice found the cache
    assert len({request.uid for request in engine.requests}) == 3
    chunks = await streamed(client, n=3, seed=7)
    assert [fold(chunks, index)["content"] for index in range(3)] == expected


async def test_logprobs_in_the_shape_of_chat(client: openai.AsyncOpenAI, engine: FakeEngine) -> None:
    engine.script = lambda request: with_logprobs(answer("é!"), request.sampling.num_logprobs)
    reply = await client.chat.completions.create(model="toy", messages=USER, logprobs=True, top_logprobs=2)
    entries = reply.choices[0].logprobs.content
    assert [entry.bytes for entry in entries] == [[0xC3], [0xA9], [0x21]]  # <|im_end|> is not part of the text
    assert entries[2].token == "!"
    assert [entry.logprob for entry in entries] == [-1.95, -1.69, -0.33]
    assert [(top.token, top.logprob) for top in entries[2].top_logprobs] == [("!", -0.33), ('"', -0.34)]
    chunks = await streamed(client, logprobs=True, top_logprobs=2)
    from_stream = [
        entry for chunk in chunks if chunk.choices[0].logprobs for entry in chunk.choices[0].logprobs.content
    ]
    assert from_stream == entries
    assert fold(chunks)["content"] == "é!"


async def test_logprobs_of_what_a_stop_string_swallowed_are_not_shown(
    client: openai.AsyncOpenAI, engine: FakeEngine
) -> None:
    engine.script = lambda request: with_logprobs(answer("abcdef"), 0)
    reply = await client.chat.completions.create(model="toy", messages=USER, logprobs=True, stop="cd")
    assert [entry.token for entry in reply.choices[0].logprobs.content] == ["a", "b"]
    assert reply.choices[0].logprobs.content[0].top_logprobs == []


async def test_a_tool_call(client: openai.AsyncOpenAI, engine: FakeEngine) -> None:
    engine.script = lambda request: answer("Let me see." + CALL)
    reply = await client.chat.completions.create(model="toy", messages=USER, tools=[WEATHER])
    (choice,) = reply.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Let me see."
    (call,) = choice.message.tool_calls
    assert (call.type, call.function.name) == ("function", "get_weather")
    assert json.loads(call.function.arguments) == {"city": "上海"}
    prompt = bytes(token_id for token_id in engine.requests[0].prompt_token_ids if token_id < 256).decode()
    assert '"city": {"type": "string"}' in prompt  # the sloppy type "str", put right
    result = fold(await streamed(client, tools=[WEATHER]))
    assert result["content"] == "Let me see."
    assert result["finish_reason"] == "tool_calls"
    assert [(call["name"], call["arguments"]) for call in result["calls"]] == [
        ("get_weather", choice.message.tool_calls[0].function.arguments)
    ]
    assert result["calls"][0]["id"].startswith("call_")


async def test_content_is_null_beside_nothing_but_calls(client: openai.AsyncOpenAI, engine: FakeEngine) -> None:
    engine.script = lambda request: answer(CALL + CALL)
    message = (await client.chat.completions.create(model="toy", messages=USER, tools=[WEATHER])).choices[0].message
    assert message.content is None
    assert len({call.id for call in message.tool_calls}) == 2


async def test_parallel_tool_calls_false_ends_after_the_first_call(
    client: openai.AsyncOpenAI, engine: FakeEngine
) -> None:
    engine.script = lambda request: answer(CALL + CALL, tokens_a_chunk=1000)
    fields: dict[str, Any] = {"tools": [WEATHER], "parallel_tool_calls": False}
    choice = (await client.chat.completions.create(model="toy", messages=USER, **fields)).choices[0]
    assert len(choice.message.tool_calls) == 1
    assert choice.finish_reason == "tool_calls"
    result = fold(await streamed(client, **fields))
    assert (len(result["calls"]), result["finish_reason"]) == (1, "tool_calls")


@pytest.mark.parametrize("fields", [{}, {"tools": [WEATHER], "tool_choice": "none"}])
async def test_without_tools_nothing_is_a_call(
    client: openai.AsyncOpenAI, engine: FakeEngine, fields: dict[str, Any]
) -> None:
    engine.script = lambda request: answer(CALL)
    choice = (await client.chat.completions.create(model="toy", messages=USER, **fields)).choices[0]
    assert choice.finish_reason == "stop"
    assert choice.message.tool_calls is None
    assert choice.message.content == '\n{"name": "get_weather", "parameters": {"city": "上海"}}'
    assert b"get_weather" not in bytes(i for i in engine.requests[0].prompt_token_ids if i < 256)


async def test_a_broken_call_ends_as_content(client: openai.AsyncOpenAI, engine: FakeEngine) -> None:
    broken = '<|action_start|><|plugin|>\n{"name": "get_weather", "parameters": {"city": oops<|action_end|>'
    engine.script = lambda request: answer(broken)
    choice = (await client.chat.completions.create(model="toy", messages=USER, tools=[WEATHER])).choices[0]
    assert choice.finish_reason == "stop"
    assert choice.message.tool_calls is None
    assert '{"city": oops' in choice.message.content
    result = fold(await streamed(client, tools=[WEATHER]))
    assert result["finish_reason"] == "stop"
    assert result["content"] == choice.message.content


async def test_a_call_cut_short_is_no_call(client: openai.AsyncOpenAI, engine: FakeEngine) -> None:
    engine.script = lambda request: answer(CALL[:60], finish=FinishReason.LENGTH)
    choice = (await client.chat.completions.create(model="toy", messages=USER, tools=[WEATHER])).choices[0]
    assert choice.finish_reason == "length"
    assert choice.message.tool_calls is None
    assert "get_weather" in choice.message.content


async def test_an_sdk_message_can_be_sent_back_as_it_came(client: openai.AsyncOpenAI, engine: FakeEngine) -> None:
    engine.script = lambda request: answer(CALL)
    first = await client.chat.completions.create(model="toy", messages=USER, tools=[WEATHER])
    message = first.choices[0].message
    history = [
        *USER,
        message.model_dump(),
        {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "sunny"},
    ]
    engine.script = lambda request: answer("It is sunny.")
    reply = await client.chat.completions.create(model="toy", messages=history, tools=[WEATHER])
    assert reply.choices[0].message.content == "It is sunny."
    prompt = bytes(token_id for token_id in engine.requests[1].prompt_token_ids if token_id < 256).decode()
    assert "sunny" in prompt
    assert prompt.count("上海") == 1


async def test_an_answer_can_be_continued(client: openai.AsyncOpenAI, engine: FakeEngine) -> None:
    messages = [*USER, {"role": "assistant", "content": "Once upon"}]
    await client.chat.completions.create(model="toy", messages=messages, extra_body={"continue_final_message": True})
    assert bytes(i for i in engine.requests[0].prompt_token_ids if i < 256).endswith(b"assistant\nOnce upon")


async def test_a_long_prompt_is_rendered_off_the_event_loop(
    client: openai.AsyncOpenAI, engine: FakeEngine, model: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[str] = []
    prepare = type(model.renderer).prepare

    def spying(*args: Any, **kwargs: Any) -> Prompt:
        threads.append(threading.current_thread().name)
        return prepare(*args, **kwargs)

    monkeypatch.setattr(type(model.renderer), "prepare", spying)
    await client.chat.completions.create(model="toy", messages=USER)
    await client.chat.completions.create(model="toy", messages=[{"role": "user", "content": "x" * 2500}])
    assert threads[0] == threading.main_thread().name
    assert threads[1].startswith("lmdserve-prompt")
    assert engine.requests[1].prompt_token_ids.count(ord("x")) == 2500


async def test_what_openais_schema_requires_is_there(session: aiohttp.ClientSession, url: str) -> None:
    """Clients generated from the schema refuse a message without `refusal`, which is required and may be null."""
    body = {"messages": USER, "logprobs": True}
    async with session.post(url + "/v1/chat/completions", json=body) as reply:
        whole = await reply.json()
    (choice,) = whole["choices"]
    assert whole.keys() == {"id", "object", "created", "model", "choices", "usage"}
    assert choice.keys() == {"index", "message", "logprobs", "finish_reason"}
    assert choice["message"].keys() == {"role", "content", "refusal"}
    assert choice["message"]["refusal"] is None
    assert choice["logprobs"].keys() == {"content", "refusal"}
    assert choice["logprobs"]["refusal"] is None


@pytest.mark.parametrize("fields", [{}, {"model": None}, {"model": ""}])
async def test_no_model_is_the_one_that_is_served(
    session: aiohttp.ClientSession, url: str, fields: dict[str, str | None]
) -> None:
    """Clients of servers with one model leave the name empty."""
    async with session.post(url + "/v1/chat/completions", json={"messages": USER, **fields}) as reply:
        assert (reply.status, (await reply.json())["model"]) == (200, "toy")


async def test_models(client: openai.AsyncOpenAI) -> None:
    (listed,) = (await client.models.list()).data
    assert (listed.id, listed.object, listed.owned_by) == ("toy", "model", "lmdserve")
    assert listed.max_model_len == SESSION_LEN
    assert await client.models.retrieve("toy") == listed
    with pytest.raises(openai.NotFoundError, match="serves 'toy'"):
        await client.models.retrieve("some/other")
