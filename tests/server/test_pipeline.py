"""The Python pipeline over a scripted engine: from plain code, from a running event loop, streamed and whole."""

import asyncio
import dataclasses
from collections.abc import Iterator

import pytest
from schema_samples import tool
from server_fakes import FakeEngine, answer, text_ids

from lmdserve.engine.api import ConfigError, EngineDeadError, FinishReason, Request
from lmdserve.server.errors import BadRequestError, InvalidOutputError
from lmdserve.server.model import ServedModel
from lmdserve.server.pipeline import GenerationConfig, Pipeline, Response, pipeline


def echo_last_words(request: Request) -> Iterator[object]:
    """Answer every prompt with its own user message, so that mixed-up answers show."""
    prompt = bytes(token_id for token_id in request.prompt_token_ids if token_id < 256).decode()
    return answer(prompt.split("user\n")[1].split("\nassistant")[0].strip())


@pytest.fixture
def pipe(engine: FakeEngine, model: ServedModel) -> Iterator[Pipeline]:
    engine.script = echo_last_words
    with Pipeline(engine, model) as open_pipeline:
        yield open_pipeline


def test_one_prompt_gives_one_response(pipe: Pipeline) -> None:
    response = pipe("Hello there")
    assert isinstance(response, Response)
    assert response.text == "Hello there"
    assert response.finish_reason == "stop"
    assert response.token_ids == (*text_ids("Hello there"), *text_ids("<|im_end|>"))
    assert response.generate_token_len == len(response.token_ids)


def test_a_list_of_prompts_is_answered_in_order(pipe: Pipeline) -> None:
    prompts = ["short", "a much longer one", "你好"]
    responses = pipe(prompts)
    assert [response.text for response in responses] == prompts
    assert [response.index for response in responses] == [0, 1, 2]


def test_messages_are_one_prompt_and_lists_of_messages_are_several(pipe: Pipeline) -> None:
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    assert pipe(messages).text == "Hi"
    assert [response.text for response in pipe([messages, messages])] == ["Hi", "Hi"]


def test_no_prompts_no_responses(pipe: Pipeline) -> None:
    assert pipe([]) == []


def test_pieces_of_a_stream_join_to_the_whole_answer(pipe: Pipeline) -> None:
    pieces = list(pipe.stream_infer(["first", "second"]))
    assert len(pieces) > 2
    for index, text in enumerate(("first", "second")):
        own = [piece for piece in pieces if piece.index == index]
        assert "".join(piece.text for piece in own) == text
        assert [piece.finish_reason is not None for piece in own] == [False] * (len(own) - 1) + [True]


async def test_it_works_where_an_event_loop_already_runs(pipe: Pipeline) -> None:
    """As in a notebook: the blocking form on the loop's own thread, and the async forms beside other tasks."""
    assert pipe("Hello").text == "Hello"
    assert (await pipe.ainfer("Hello")).text == "Hello"
    both = await asyncio.gather(pipe.ainfer(["a", "b"]), pipe.ainfer("c"))
    assert [response.text for response in both[0]] + [both[1].text] == ["a", "b", "c"]
    assert "".join([piece.text async for piece in pipe.astream_infer("streamed")]) == "streamed"


def test_stop_words_end_an_answer_and_are_not_part_of_it(pipe: Pipeline, engine: FakeEngine) -> None:
    response = pipe("one two three", GenerationConfig(stop_words=["two"]))
    assert (response.text, response.finish_reason) == ("one ", "stop")
    assert len(engine.aborted) == 1


def test_leaving_a_stream_early_ends_the_sequence(pipe: Pipeline, engine: FakeEngine) -> None:
    engine.script = lambda request: answer("x" * 50, finish=FinishReason.LENGTH, pause_s=0.01)
    stream = pipe.stream_infer("Hello")
    next(stream)
    stream.close()
    asyncio.run(engine.until_idle())
    assert len(engine.aborted) == 1


def test_an_engine_error_reaches_the_caller(pipe: Pipeline, engine: FakeEngine) -> None:
    engine.script = lambda request: [EngineDeadError("the engine is gone")]
    with pytest.raises(EngineDeadError, match="gone"):
        pipe(["a", "b"])
    assert engine.live == set()


def test_the_generation_config_reaches_the_engine(pipe: Pipeline, engine: FakeEngine) -> None:
    config = GenerationConfig(
        do_sample=True, temperature=0.5, top_p=0.9, top_k=7, random_seed=3, max_new_tokens=9, stop_token_ids=[65]
    )
    pipe("Hello", config)
    sampling = engine.requests[-1].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed) == (0.5, 0.9, 7, 3)
    assert sampling.max_tokens == 9
    assert 65 in sampling.stop_token_ids
    pipe("Hello")
    assert engine.requests[-1].sampling.temperature == 0.0


WEATHER = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
CALL = '<|action_start|><|plugin|>\n{"name": "weather", "parameters": {"city": "上海"}}<|action_end|>'


def test_tools_are_offered_and_calls_come_whole(pipe: Pipeline, engine: FakeEngine) -> None:
    engine.script = lambda request: answer("Hm. " + CALL + CALL)
    config = GenerationConfig(tools=[tool("weather", WEATHER)])
    response = pipe("How is it in 上海?", config)
    assert (response.text, response.finish_reason) == ("Hm. ", "tool_calls")
    assert [(call.name, call.arguments) for call in response.tool_calls] == [("weather", '{"city": "上海"}')] * 2
    pieces = list(pipe.stream_infer("How is it?", config))
    assert [len(piece.tool_calls) for piece in pieces if piece.tool_calls] == [1, 1]
    assert engine.requests[-1].constraint is not None
    assert pipe("Hi", dataclasses.replace(config, tool_choice="none")).tool_calls == ()


def test_an_answer_obeys_its_format_or_is_an_error(pipe: Pipeline, engine: FakeEngine) -> None:
    unique = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "array", "uniqueItems": True}}}
    engine.script = lambda request: answer("[1, 1]")
    with pytest.raises(InvalidOutputError, match="non-unique"):
        pipe("Hi", GenerationConfig(response_format=unique))
    assert engine.requests[-1].constraint is not None
    for wrong in ({"type": "yaml"}, {"type": "json_schema", "json_schema": {"schema": {"minimum": "a"}}}):
        with pytest.raises(BadRequestError, match="response_format"):
            pipe("Hi", GenerationConfig(response_format=wrong))


def test_each_prompt_may_have_a_config_of_its_own(pipe: Pipeline) -> None:
    """As in LMDeploy; a list was an AttributeError out of the engine's thread."""
    whole, cut = pipe(["one two", "one two"], [GenerationConfig(), GenerationConfig(stop_words=["two"])])
    assert (whole.text, cut.text) == ("one two", "one ")
    with pytest.raises(ValueError, match="1 configs for 2 prompts"):
        pipe(["a", "b"], [GenerationConfig()])


@pytest.mark.parametrize("prompts", [None, 3, {"role": "user", "content": "Hi"}])
def test_what_is_no_prompt_is_named(pipe: Pipeline, prompts: object) -> None:
    with pytest.raises(TypeError, match="a prompt is a string or a list of messages"):
        pipe(prompts)


def test_a_wrong_message_is_explained_as_over_http(pipe: Pipeline) -> None:
    with pytest.raises(BadRequestError, match=r'messages\[0\].role: expected one of .*"user", got "robot"'):
        pipe([{"role": "robot", "content": "Hi"}])
    with pytest.raises(BadRequestError, match=r"messages\[0\].content: expected a string or a list, got .*object"):
        pipe([{"role": "user", "content": object()}])


def test_a_closed_pipeline_says_so(engine: FakeEngine, model: ServedModel) -> None:
    pipe = Pipeline(engine, model)
    pipe.close()
    with pytest.raises(RuntimeError, match="closed; make a new one"):
        pipe("Hi")


def test_closing_stops_the_engine_and_twice_is_harmless(engine: FakeEngine, model: ServedModel) -> None:
    pipe = Pipeline(engine, model)
    pipe.close()
    pipe.close()
    assert engine.stopped_after_s == [0.0]


def test_an_unknown_option_or_model_says_so() -> None:
    with pytest.raises(ConfigError, match="/no/such/folder"):
        pipeline("/no/such/folder")
    with pytest.raises(TypeError, match="quant_polizy"):
        pipeline("demo", quant_polizy=4)
