"""POST /v1/completions through the real openai SDK: all kinds of prompts, echo, logprobs, several choices."""

from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
from server_fakes import CONTROL_IDS, FakeEngine, Script, answer, text_ids, token_logprob, with_logprobs

from lmdserve.engine.api import Chunk, ContextTooLongError, FinishReason, Request

BOS = CONTROL_IDS["<s>"]


@pytest.fixture
async def client(url: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as sdk:
        yield sdk


def repeat_prompt(request: Request) -> Script:
    """Answer with the prompt's text and "?", as a model of few ideas would."""
    ids = [*(i for i in request.prompt_token_ids if i < 256), ord("?")]
    return [Chunk((i,), finish_reason=FinishReason.LENGTH if n == len(ids) else None) for n, i in enumerate(ids, 1)]


def score_prompt(request: Request) -> Script:
    """Give the prompt's logprobs with the first chunk, as the engine does."""
    first, *rest = with_logprobs(answer("yz", finish=FinishReason.LENGTH), request.sampling.num_logprobs or 0)
    assert isinstance(first, Chunk)
    if request.num_prompt_logprobs is not None:
        known = [token_logprob(i, request.num_prompt_logprobs) for i in request.prompt_token_ids[1:]]
        first = first._replace(prompt_logprobs=(None, *known))
    return [first, *rest]


@pytest.mark.parametrize(
    ("prompt", "expected_ids"),
    [
        ("né", [[BOS, *text_ids("né")]]),
        (["a", "bc"], [[BOS, *text_ids("a")], [BOS, *text_ids("bc")]]),
        ([104, 105], [[104, 105]]),
        ([[104], [105, 106]], [[104], [105, 106]]),
        ("<|im_end|>", [[BOS, *b"<|im_end|>"]]),  # typed, so text
    ],
)
async def test_prompts_of_every_kind(
    client: openai.AsyncOpenAI, engine: FakeEngine, prompt: Any, expected_ids: list[list[int]]
) -> None:
    engine.script = repeat_prompt
    reply = await client.completions.create(model="toy", prompt=prompt)
    assert [list(request.prompt_token_ids) for request in engine.requests] == expected_ids
    texts = [bytes(i for i in ids if i < 256).decode() + "?" for ids in expected_ids]
    assert [(choice.index, choice.text) for choice in reply.choices] == list(enumerate(texts))
    assert reply.object == "text_completion"
    assert reply.usage.prompt_tokens == sum(map(len, expected_ids))
    assert engine.requests[0].sampling.max_tokens == 16  # OpenAI's default
    assert engine.requests[0].sampling.stop_token_ids == frozenset()  # the ends of turns are a chat's affair


async def test_n_choices_of_each_prompt_are_numbered_prompt_by_prompt(
    client: openai.AsyncOpenAI, engine: FakeEngine
) -> None:
    engine.script = repeat_prompt
    fields: dict[str, Any] = {"model": "toy", "prompt": ["a", "b"], "n": 2, "seed": 5}
    fields["extra_body"] = {"deterministic": True}
    reply = await client.completions.create(**fields)
    assert [choice.text for choice in reply.choices] == ["a?", "a?", "b?", "b?"]
    assert reply.usage.prompt_tokens == 4
    assert [request.sampling.seed for request in engine.requests] == [5, 6, 5, 6]
    assert all(request.deterministic for request in engine.requests)
    texts = ["", "", "", ""]
    finish_reasons: dict[int, str] = {}
    async for chunk in await client.completions.create(stream=True, **fields):
        for choice in chunk.choices:
            assert choice.index not in finish_reasons
            texts[choice.index] += choice.text
            if choice.finish_reason:
                finish_reasons[choice.index] = choice.finish_reason
    assert texts == ["a?", "a?", "b?", "b?"]
    assert finish_reasons == dict.fromkeys(range(4), "length")


@pytest.mark.parametrize("stream", [False, True])
async def test_echo_puts_the_prompt_first(client: openai.AsyncOpenAI, engine: FakeEngine, stream: bool) -> None:
    engine.script = repeat_prompt
    if stream:
        reply = await client.completions.create(model="toy", prompt="狐 ", echo=True, stream=True)
        text = "".join([chunk.choices[0].text async for chunk in reply])
    else:
        text = (await client.completions.create(model="toy", prompt="狐 ", echo=True)).choices[0].text
    assert text == "狐 狐 ?"
    assert engine.requests[0].num_prompt_logprobs is None


@pytest.mark.parametrize("stream", [False, True])
async def test_logprobs_with_echo_cover_prompt_and_answer(
    client: openai.AsyncOpenAI, engine: FakeEngine, stream: bool
) -> None:
    engine.script = score_prompt
    fields: dict[str, Any] = {"model": "toy", "prompt": "aé", "echo": True, "logprobs": 1, "max_tokens": 2}
    if stream:
        chunks = [chunk.choices[0].logprobs async for chunk in await client.completions.create(stream=True, **fields)]
        tokens, token_logprobs, top_logprobs, text_offset = (
            [item for chunk in chunks for item in getattr(chunk, name)]
            for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        )
    else:
        logprobs = (await client.completions.create(**fields)).choices[0].logprobs
        tokens, token_logprobs = logprobs.tokens, logprobs.token_logprobs
        top_logprobs, text_offset = logprobs.top_logprobs, logprobs.text_offset
    assert tokens == ["<s>", "a", r"bytes:\xc3", r"bytes:\xa9", "y", "z"]
    assert token_logprobs == [None, -0.97, -1.95, -1.69, -1.21, -1.22]
    assert text_offset == [0, 0, 1, 1, 2, 3]
    assert top_logprobs[0] is None
    assert top_logprobs[-1] == {"z": -1.22}
    assert engine.requests[0].num_prompt_logprobs == 1


async def test_a_prompt_can_be_scored_without_generating(client: openai.AsyncOpenAI, engine: FakeEngine) -> None:
    engine.script = score_prompt
    reply = await client.completions.create(model="toy", prompt=[104, 105], echo=True, logprobs=0, max_tokens=0)
    (choice,) = reply.choices
    assert choice.text == "hi"
    assert choice.logprobs.token_logprobs == [None, -1.05]
    assert choice.logprobs.top_logprobs == [None, {"i": -1.05}]  # the token itself, as OpenAI has it
    assert choice.finish_reason == "length"
    assert reply.usage.completion_tokens == 0
    assert engine.requests[0].sampling.max_tokens == 1
    assert not engine.live


async def test_logprobs_of_minus_infinity_stay_numbers(client: openai.AsyncOpenAI, engine: FakeEngine) -> None:
    def script(request: Request) -> Script:
        entry = token_logprob(97, 0)._replace(logprob=float("-inf"), top=((98, -0.5),))
        return [Chunk((97,), (entry,), finish_reason=FinishReason.LENGTH)]

    engine.script = script
    reply = await client.completions.create(model="toy", prompt="x", logprobs=1)
    assert reply.choices[0].logprobs.token_logprobs == [-9999.0]
    assert reply.choices[0].logprobs.top_logprobs == [{"b": -0.5, "a": -9999.0}]


async def test_usage_of_a_stream(client: openai.AsyncOpenAI, engine: FakeEngine) -> None:
    engine.script = repeat_prompt
    options = {"include_usage": True}
    reply = await client.completions.create(model="toy", prompt="ab", stream=True, stream_options=options)
    chunks = [chunk async for chunk in reply]
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * 3
    assert (chunks[-1].choices, chunks[-1].usage.total_tokens) == ([], 6)


async def test_an_error_about_the_prompt_is_called_by_this_routes_name(
    client: openai.AsyncOpenAI, engine: FakeEngine
) -> None:
    engine.script = lambda request: [ContextTooLongError(5000, 4096)]
    with pytest.raises(openai.BadRequestError, match=r"5000 tokens.*context length is 4096") as caught:
        await client.completions.create(model="toy", prompt="x")
    assert (caught.value.param, caught.value.code) == ("prompt", "context_length_exceeded")


@pytest.mark.parametrize("route", ["chat", "completions"])
async def test_a_prompt_that_cannot_fit_is_refused_without_being_tokenized(
    client: openai.AsyncOpenAI, engine: FakeEngine, route: str
) -> None:
    """16 MB of text took 20 s to tokenize, only to be refused by the engine."""
    text = "x" * 2_000_000
    if route == "chat":
        reply = client.chat.completions.create(model="toy", messages=[{"role": "user", "content": text}])
    else:
        reply = client.completions.create(model="toy", prompt=text)
    with pytest.raises(openai.BadRequestError, match=r"2\d{6} characters.*maximum context length is \d+") as caught:
        await reply
    assert caught.value.code == "context_length_exceeded"
    assert caught.value.param == ("messages" if route == "chat" else "prompt")
    assert not engine.requests
