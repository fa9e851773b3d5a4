"""The text around a call: what each format's template renders as a call is what its grammar takes, token by token."""

from pathlib import Path
from typing import Any

import pytest
from schema_samples import CITY, tool
from toy_models import TOY_MODELS

from lmdserve.engine.api import EngineInfo
from lmdserve.server.model import ServedModel, load_served_model
from lmdserve.server.output_rules import OutputRules, ToolOffer
from lmdserve.server.tool_choice import ToolChoice
from lmdserve.tools.constraint import ReplyConstraint
from lmdserve.tools.schema import normalize_tools

NAMES = ("qwen", "qwen without tools", "hermes, spelled", "llama", "mistral", "internlm2")
TOOLS = normalize_tools([tool("weather", CITY), tool("add", None)])
USER = {"role": "user", "content": "Hi"}


def _call(name: str, arguments: str, call_id: str) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


CALLS = [_call("weather", '{"city": "上海"}', "abcdefgh1"), _call("add", '{"a": [1, 2]}', "abcdefgh2")]


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ServedModel]:
    def load(name: str) -> ServedModel:
        folder = TOY_MODELS[name].write(tmp_path_factory.mktemp(name.replace(" ", "_")))
        return load_served_model(Path(folder), name="toy", chat_template=None)

    return {name: load(name) for name in NAMES}


async def _constraint(model: ServedModel, choice: ToolChoice, *, is_parallel: bool = True) -> ReplyConstraint:
    assert model.renderer.tool_format is not None
    offer = ToolOffer(
        tools=TOOLS,
        choice=choice,
        tool_format=model.renderer.tool_format,
        is_parallel=is_parallel,
        has_builtin=False,
    )
    size = model.tokenizer.vocab_size
    info = EngineInfo(vocab_size=size, session_len=4096, eos_token_ids=model.tokenizer.eos_token_ids)
    rules = OutputRules(model, info)
    try:
        planned = await rules.plan(None, offer, can_reason=False, opens_in_reasoning=False)
    finally:
        rules.close()
    assert planned.rules is not None
    return planned.rules.new_constraint()


def _rendered(model: ServedModel, num_calls: int) -> list[int]:
    """Return the ids that the model's template gives for an answer of calls, without what ends the turn."""
    answer = {"role": "assistant", "content": "", "tool_calls": CALLS[:num_calls]}
    before = model.renderer.render([USER], tools=TOOLS)
    whole = model.renderer.render([USER, answer], tools=TOOLS, add_generation_prompt=False)
    assert whole[: len(before)] == before
    ends = model.renderer.stop_token_ids | model.tokenizer.eos_token_ids
    own = whole[len(before) :]
    return own[: next(place for place, token_id in enumerate(own) if token_id in ends)]


def _num_accepted(constraint: ReplyConstraint, token_ids: list[int]) -> int:
    for place, token_id in enumerate(token_ids):
        mask = constraint.mask()
        if mask is not None and not mask[token_id // 8] >> token_id % 8 & 1:
            return place
        constraint.accept(token_id)
    return len(token_ids)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("choice", [ToolChoice(), ToolChoice(is_required=True)], ids=["auto", "required"])
@pytest.mark.parametrize("num_calls", [1, 2])
async def test_rendered_calls_are_accepted(
    served: dict[str, ServedModel], name: str, choice: ToolChoice, num_calls: int
) -> None:
    if name == "mistral" and num_calls == 2:
        pytest.skip("its newer form, which tokens for it ask for, is not the one of our template")
    model = served[name]
    token_ids = _rendered(model, num_calls)
    if name == "mistral":
        token_ids = TOY_MODELS[name].ids('[TOOL_CALLS]weather[ARGS]{"city": "上海"}')
    if token_ids[:1] == list(b"\n"):
        token_ids = token_ids[1:]
    constraint = await _constraint(model, choice)
    assert _num_accepted(constraint, token_ids) == len(token_ids)
    ends = model.renderer.stop_token_ids | model.tokenizer.eos_token_ids
    mask = constraint.mask()
    assert mask is not None
    assert any(mask[end // 8] >> end % 8 & 1 for end in ends), "the reply may end behind a call"


@pytest.mark.parametrize("name", NAMES)
async def test_a_wrong_name_or_argument_is_not_accepted(served: dict[str, ServedModel], name: str) -> None:
    model = served[name]
    for old, new in (("weather", "whether"), ('"city"', '"cities"'), ('"上海"', "7")):
        call = '{"name": "weather", "parameters": {"city": "上海"}}'
        text = {
            "mistral": '[TOOL_CALLS]weather[ARGS]{"city": "上海"}',
            "llama": call,
            "internlm2": f"<|action_start|><|plugin|>\n{call}<|action_end|>",
        }.get(name, '<tool_call>\n{"name": "weather", "arguments": {"city": "上海"}}\n</tool_call>')
        token_ids = TOY_MODELS[name].ids(text.replace(old, new, 1))
        constraint = await _constraint(model, ToolChoice())
        assert _num_accepted(constraint, token_ids) < len(token_ids)


async def test_one_call_is_one_call(served: dict[str, ServedModel]) -> None:
    model = served["internlm2"]
    constraint = await _constraint(model, ToolChoice(is_required=True), is_parallel=False)
    first = _rendered(model, 1)
    assert _num_accepted(constraint, _rendered(model, 2)) == len(first)
    assert constraint.must_end


async def test_free_text_stays_free(served: dict[str, ServedModel]) -> None:
    """Without a token that opens a call nothing is masked, whatever the text spells."""
    for name in ("internlm2", "qwen"):
        constraint = await _constraint(served[name], ToolChoice())
        for token_id in b'{"name": "weather"} <tool_call>':
            assert constraint.mask() is None
            constraint.accept(token_id)
