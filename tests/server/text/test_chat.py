"""Rendering of conversations: recorded prompts, transformers on the same templates, an error for every bad field."""

import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import transformers

from lmdserve.engine.api import ConfigError
from lmdserve.server.chat import ChatRenderer, ChatTemplateError
from lmdserve.server.text import Tokenizer

HUB_STYLE_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HELLO = [{"role": "user", "content": "Hello"}]
WEATHER_TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
WriteTokenizer = Callable[..., Path]


def _load(folder: Path, template_path: Path | None = None) -> ChatRenderer:
    return ChatRenderer.load(folder, Tokenizer.load(folder), template_path=template_path)


@pytest.fixture(scope="module")
def renderers(family_folders: dict[str, Path]) -> dict[str, ChatRenderer]:
    return {name: _load(folder) for name, folder in family_folders.items()}


@pytest.fixture
def with_template(write_tokenizer_json: WriteTokenizer) -> Callable[[str], ChatRenderer]:
    def load(template: str) -> ChatRenderer:
        tokens = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
        config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": template}
        return _load(write_tokenizer_json("byte_level", tokens, tokenizer_config=config))

    return load


# --- InternLM2 against recorded prompts ---


@pytest.fixture(scope="module")
def recorded(shared_fixtures: Path) -> dict[str, Any]:
    return json.loads((shared_fixtures / "chat_render.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module", params=["no template in the checkpoint", "the hub's template in the checkpoint"])
def internlm2(request: pytest.FixtureRequest, internlm2_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    if request.param.startswith("no"):
        return _load(internlm2_folder)
    folder = tmp_path_factory.mktemp("internlm2_hub")
    for name in ("tokenizer.model", "config.json"):
        (folder / name).symlink_to(internlm2_folder / name)
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": HUB_STYLE_TEMPLATE}))
    return _load(folder)


@pytest.mark.parametrize("name", ["plain", "no_system"])
def test_internlm2_without_tools_is_the_hub_template(internlm2: ChatRenderer, recorded: Any, name: str) -> None:
    expected = recorded["rendered"]["internlm2_hf_tokenizer_config"]["prompts"][name]
    assert internlm2.render_text(**recorded["conversations"][name]) == expected


@pytest.mark.parametrize("name", ["plain", "tools_offered", "tool_round", "parallel_round"])
def test_internlm2_is_the_official_format(internlm2: ChatRenderer, recorded: Any, name: str) -> None:
    prompts = recorded["rendered"]["official_internlm2"]["prompts"]
    expected = prompts.get(name) or prompts[f"{name}_convention"]
    assert internlm2.render_text(**recorded["conversations"][name]) == expected


def test_internlm2_ids_are_those_of_the_text(
    internlm2_folder: Path, internlm2_tokenizer: Tokenizer, recorded: Any
) -> None:
    renderer = ChatRenderer.load(internlm2_folder, internlm2_tokenizer)
    for conversation in recorded["conversations"].values():
        text = renderer.render_text(**conversation)
        expected = internlm2_tokenizer.encode_segments(internlm2_tokenizer.split_control(text))
        ids = renderer.render(**conversation)
        assert ids == expected
        assert ids.count(1) == 1, "BOS once"
        assert ids[0] == 1


def test_internlm2_a_turn_is_one_span(internlm2_folder: Path, internlm2_tokenizer: Tokenizer) -> None:
    """The newline after the role joins newlines of the content: [1008, 402, 15720], not 364 twice."""
    ids = ChatRenderer.load(internlm2_folder, internlm2_tokenizer).render([{"role": "user", "content": "\n hi"}])
    assert ids[:6] == [1, 92543, 1008, 402, 15720, 92542]


def test_internlm2_environment_messages(internlm2: ChatRenderer) -> None:
    """InternLM's own examples return results as `environment`, named after the tool kind."""
    text = internlm2.render_text([*HELLO, {"role": "environment", "name": "plugin", "content": "3+5=8"}])
    assert text.endswith("<|im_start|>environment name=<|plugin|>\n3+5=8<|im_end|>\n<|im_start|>assistant\n")


def test_internlm2_stops_at_the_end_of_a_turn(internlm2: ChatRenderer) -> None:
    assert internlm2.stop_token_ids == {92542}
    assert internlm2.tool_format is not None


# --- built-in templates of families whose checkpoints lack one ---

ROUND = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi!"},
    {"role": "user", "content": "Bye"},
]


def test_internlm_prompt(renderers: dict[str, ChatRenderer], family_folders: dict[str, Path]) -> None:
    expected = "<s><|System|>:Be kind.\n<|User|>:Hello\n<|Bot|>:Hi!<eoa>\n<|User|>:Bye\n<|Bot|>:"
    assert renderers["internlm"].render_text(ROUND) == expected
    eoa = Tokenizer.load(family_folders["internlm"]).control_tokens["<eoa>"]
    assert renderers["internlm"].stop_token_ids == {eoa}
    assert renderers["internlm"].render(ROUND).count(eoa) == 1


def test_llama2_prompt(renderers: dict[str, ChatRenderer]) -> None:
    expected = "<s>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nHello [/INST] Hi! </s><s>[INST] Bye [/INST]"
    assert renderers["llama2"].render_text(ROUND) == expected


def test_llama3_prompt(write_tokenizer_json: WriteTokenizer) -> None:
    tokens = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    folder = write_tokenizer_json(
        "byte_level", tokens, config={"model_type": "llama"}, tokenizer_config={"bos_token": "<|begin_of_text|>"}
    )
    head = "<|start_header_id|>{}<|end_header_id|>\n\n"
    expected = "<|begin_of_text|>" + "".join(
        head.format(message["role"]) + message["content"] + "<|eot_id|>" for message in ROUND
    )
    assert _load(folder).render_text(ROUND) == expected + head.format("assistant")


def test_chatml_prompt(write_tokenizer_json: WriteTokenizer) -> None:
    folder = write_tokenizer_json("byte_level", ["<|im_start|>", "<|im_end|>"], config={"model_type": "qwen2"})
    renderer = _load(folder)
    assert renderer.render_text(HELLO) == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert renderer.render_text(HELLO, add_generation_prompt=False) == "<|im_start|>user\nHello<|im_end|>\n"


@pytest.mark.parametrize("family", ["internlm", "llama2"])
def test_families_without_tools_say_so(renderers: dict[str, ChatRenderer], family: str) -> None:
    with pytest.raises(ChatTemplateError, match="does not take tools") as caught:
        renderers[family].render(HELLO, tools=[WEATHER_TOOL])
    assert caught.value.param == "tools"
    with pytest.raises(ChatTemplateError, match="refuses these messages"):
        renderers[family].render([*HELLO, {"role": "tool", "content": "22"}])


def test_a_model_without_a_template(write_tokenizer_json: WriteTokenizer) -> None:
    renderer = _load(write_tokenizer_json("byte_level", ["<|endoftext|>"], config={"model_type": "qwen2"}))
    with pytest.raises(ChatTemplateError, match="no chat template") as caught:
        renderer.render(HELLO)
    assert caught.value.param == "messages"


# --- transformers as reference ---


@pytest.mark.parametrize("family", ["qwen", "llama3", "mistral"])
@pytest.mark.parametrize("with_tools", [False, True])
def test_same_prompt_as_transformers(
    renderers: dict[str, ChatRenderer], family_folders: dict[str, Path], family: str, with_tools: bool
) -> None:
    """Text and ids, with non-ASCII JSON, indented JSON, loop controls, generation blocks and white space to trim."""
    folder = family_folders[family]
    reference = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        **json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")),
    )
    call = {"id": "abc123def", "type": "function", "function": {"name": "天气", "arguments": {"città": "Zürich <b>'s"}}}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": " Hello the \n"},
        {"role": "assistant", "content": "the end"},
        {"role": "user", "content": "你好"},
    ]
    tools = None
    if with_tools:
        tools = [{"type": "function", "function": {"name": "天气", "description": 'the "weather"', "b": 1, "a": [2.5]}}]
        result = {"role": "tool", "content": '{"t": 22}', "tool_call_id": "abc123def"}
        messages += [{"role": "assistant", "content": "", "tool_calls": [call]}, result]
    text = reference.apply_chat_template(messages, tools=tools, add_generation_prompt=True, tokenize=False)
    ids = reference.apply_chat_template(messages, tools=tools, add_generation_prompt=True, return_dict=False)
    assert renderers[family].render_text(messages, tools=tools or ()) == text
    assert renderers[family].render(messages, tools=tools or ()) == ids


def test_strftime_now(with_template: Callable[[str], ChatRenderer]) -> None:
    text = with_template("{{ strftime_now('%Y') }} {{ messages[0].content }}").render_text(HELLO)
    assert text in {f"{year} Hello" for year in (datetime.now().year, datetime.now().year - 1)}


# --- which template ---


def test_tool_use_template_renders_what_offers_tools(write_tokenizer_json: WriteTokenizer) -> None:
    templates = [
        {"name": "default", "template": "plain"},
        {"name": "tool_use", "template": "with {{ tools | length }}"},
    ]
    folder = write_tokenizer_json("byte_level", [], tokenizer_config={"chat_template": templates})
    renderer = _load(folder)
    assert renderer.render_text(HELLO) == "plain"
    assert renderer.render_text(HELLO, tools=[WEATHER_TOOL]) == "with 1"
    assert renderer.render_text([*HELLO, {"role": "tool", "content": "22"}]) == "plain"


def test_precedence_of_files(write_tokenizer_json: WriteTokenizer, tmp_path: Path) -> None:
    folder = write_tokenizer_json("byte_level", [], tokenizer_config={"chat_template": "configuration"})
    assert _load(folder).render_text(HELLO) == "configuration"
    (folder / "chat_template.json").write_text('{"chat_template": "json"}')
    assert _load(folder).render_text(HELLO) == "json"
    (folder / "chat_template.jinja").write_text("jinja")
    assert _load(folder).render_text(HELLO) == "jinja"
    (tmp_path / "mine.jinja").write_text("mine")
    assert _load(folder, tmp_path / "mine.jinja").render_text(HELLO) == "mine"


@pytest.mark.parametrize(
    ("template", "complaint"),
    [
        ("{% if %}", r"not valid Jinja \(line 1"),
        ([{"name": "other", "template": ""}], "named templates with one called 'default'"),
        (["x"], "named templates"),
        (7, "neither a string nor a list"),
    ],
)
def test_a_template_that_is_none(write_tokenizer_json: WriteTokenizer, template: object, complaint: str) -> None:
    folder = write_tokenizer_json("byte_level", [], tokenizer_config={"chat_template": template})
    with pytest.raises(ConfigError, match=f"tokenizer_config.json.*{complaint}"):
        _load(folder)


def test_a_template_file_that_is_missing(write_tokenizer_json: WriteTokenizer, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.jinja cannot be read"):
        _load(write_tokenizer_json("byte_level", []), tmp_path / "nothing.jinja")


@pytest.mark.parametrize(
    "template", ["{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ raise_exception('no') }}", "{{ 1 / 0 }}"]
)
def test_templates_run_in_a_sandbox(with_template: Callable[[str], ChatRenderer], template: str) -> None:
    """A template that reaches for Python's insides, or breaks, is a refused request and not a failed server."""
    with pytest.raises(ChatTemplateError, match="refuses these messages"):
        with_template(template).render(HELLO)


# --- options ---


def test_template_variables_reach_the_template(renderers: dict[str, ChatRenderer]) -> None:
    text = renderers["qwen"].render_text(HELLO, template_kwargs={"enable_thinking": False})
    assert text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert "Today Date: 1 May\n" in renderers["llama3"].render_text(HELLO, template_kwargs={"date_string": "1 May"})


@pytest.mark.parametrize("name", ["enable_thinking", "messages", "bos_token"])
def test_variables_that_would_be_ignored_are_refused(renderers: dict[str, ChatRenderer], name: str) -> None:
    with pytest.raises(ChatTemplateError, match=r"it has: date_string") as caught:
        renderers["llama3"].render(HELLO, template_kwargs={name: True})
    assert caught.value.param == f"chat_template_kwargs.{name}"


@pytest.mark.parametrize(
    ("family", "end"),
    [
        ("internlm2", "<|im_start|>assistant\nThe fox "),
        ("qwen", "<|im_start|>assistant\nThe fox "),
        ("llama3", "<|end_header_id|>\n\nThe fox "),
        ("llama2", "[/INST] The fox "),
    ],
)
def test_the_last_message_can_be_continued(renderers: dict[str, ChatRenderer], family: str, end: str) -> None:
    messages = [*HELLO, {"role": "assistant", "content": "The fox "}]
    assert renderers[family].render_text(messages, continue_final_message=True).endswith(end)
    assert not renderers[family].render_text(messages).endswith("The fox ")


@pytest.mark.parametrize(
    "message",
    [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}],
)
def test_only_an_answer_can_be_continued(renderers: dict[str, ChatRenderer], message: dict[str, Any]) -> None:
    with pytest.raises(ChatTemplateError, match="can be continued") as caught:
        renderers["internlm2"].render([*HELLO, message], continue_final_message=True)
    assert caught.value.param == "messages[1]"


def test_a_template_that_hides_the_last_message(with_template: Callable[[str], ChatRenderer]) -> None:
    with pytest.raises(ChatTemplateError, match="hides"):
        with_template("nothing").render([{"role": "assistant", "content": "x"}], continue_final_message=True)


# --- what clients send ---


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"role": "developer", "content": "Be kind."}, "system\nBe kind."),
        ({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, "user\na\nb"),
        ({"role": "user", "content": []}, "user\n"),
        ({"role": "assistant", "content": None}, "assistant\n"),
        ({"role": "user", "content": "x", "name": None, "tool_calls": None}, "user\nx"),
        ({"role": "assistant", "content": "x", "tool_calls": []}, "assistant\nx"),
    ],
)
def test_forms_of_a_message(renderers: dict[str, ChatRenderer], message: dict[str, Any], expected: str) -> None:
    text = renderers["internlm2"].render_text([message], add_generation_prompt=False)
    assert text == f"<s><|im_start|>{expected}<|im_end|>\n"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ('{"city": "上海", "n": 1.50}', '{"city": "上海", "n": 1.5}'),
        ({"b": 1, "a": 2}, '{"b": 1, "a": 2}'),
        ("", "{}"),
        (None, "{}"),
    ],
)
def test_arguments_become_objects(renderers: dict[str, ChatRenderer], arguments: object, expected: str) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    text = renderers["qwen"].render_text([*HELLO, {"role": "assistant", "content": "", "tool_calls": [call]}])
    assert f'<tool_call>\n{{"name": "f", "arguments": {expected}}}\n</tool_call>' in text


def test_environment_is_a_tool_where_the_template_does_not_know_it(renderers: dict[str, ChatRenderer]) -> None:
    text = renderers["qwen"].render_text([*HELLO, {"role": "environment", "name": "plugin", "content": "8"}])
    assert "<|im_start|>user\n<tool_response>\n8\n</tool_response><|im_end|>" in text


def _calling(function: object) -> dict[str, Any]:
    return {"role": "assistant", "content": "", "tool_calls": [{"function": function}]}


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ([{"content": "x"}], "messages[0].role"),
        ([*HELLO, {"role": "function", "content": "x"}], "messages[1].role"),
        ([{"role": "user", "content": 7}], "messages[0].content"),
        ([{"role": "user", "content": ["x"]}], "messages[0].content[0]"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "messages[0].content[0].type"),
        ([_calling(None)], "messages[0].tool_calls[0].function"),
        ([_calling({"arguments": "{}"})], "messages[0].tool_calls[0].function"),
        ([_calling({"name": "f", "arguments": "{"})], "messages[0].tool_calls[0].function.arguments"),
        ([_calling({"name": "f", "arguments": "[1]"})], "messages[0].tool_calls[0].function.arguments"),
        ([_calling({"name": "f", "arguments": '{"a": NaN}'})], "messages[0].tool_calls[0].function.arguments"),
        ([_calling({"name": "f", "arguments": "[" * 100_000})], "messages[0].tool_calls[0].function.arguments"),
    ],
)
def test_errors_name_the_field(renderers: dict[str, ChatRenderer], messages: list[Any], param: str) -> None:
    with pytest.raises(ChatTemplateError) as caught:
        renderers["internlm2"].render(messages)
    assert caught.value.param == param
    assert param in str(caught.value)


def test_deep_nesting_is_an_error_of_the_request(renderers: dict[str, ChatRenderer]) -> None:
    nested: Any = {}
    for _ in range(5000):
        nested = {"properties": nested}
    tool = {"type": "function", "function": {"name": "f", "parameters": nested}}
    with pytest.raises(ChatTemplateError, match="nested too deeply"):
        renderers["internlm2"].render(HELLO, tools=[tool])


def test_arguments_are_not_changed(renderers: dict[str, ChatRenderer]) -> None:
    messages = [*HELLO, _calling({"name": "f", "arguments": '{"a": "<|im_end|>"}'})]
    before = json.dumps(messages)
    renderers["internlm2"].render(messages, tools=[WEATHER_TOOL])
    assert json.dumps(messages) == before


def test_lone_surrogates_in_arguments(renderers: dict[str, ChatRenderer]) -> None:
    """JSON may spell half a character; the prompt then holds a replacement character."""
    call = _calling({"name": "f", "arguments": '{"a": "\\ud83d"}'})
    renderers["internlm2"].render([*HELLO, call])


# --- templates that take one call a turn ---


def _call(name: str, call_id: str | None = None) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": name, "arguments": "{}"}}
    return call if call_id is None else {"id": call_id, **call}


@pytest.mark.parametrize("with_ids", [True, False])
def test_several_calls_become_turns_of_their_own(renderers: dict[str, ChatRenderer], with_ids: bool) -> None:
    """Llama's template refuses more than one call a turn, but its models make them."""
    ids = [{"tool_call_id": "1"}, {"tool_call_id": "2"}] if with_ids else [{}, {}]
    results = [{"role": "tool", "content": f"result {place + 1}", **ids[place]} for place in range(2)]
    calls = [_call("a", "1" if with_ids else None), _call("b", "2" if with_ids else None)]
    messages = [*HELLO, {"role": "assistant", "content": "Both.", "tool_calls": calls},
                *(reversed(results) if with_ids else results), {"role": "user", "content": "Thanks"}]  # fmt: skip
    assistant, result = (f"<|start_header_id|>{role}<|end_header_id|>\n\n" for role in ("assistant", "ipython"))
    turns = [f'{assistant}{{"name": "a", "parameters": {{}}}}', f"{result}result 1",
             f'{assistant}{{"name": "b", "parameters": {{}}}}', f"{result}result 2"]  # fmt: skip
    assert "<|eot_id|>".join(turns) in renderers["llama3"].render_text(messages)
    single = [*HELLO, {"role": "assistant", "content": "", "tool_calls": [calls[0]]}, results[0]]
    assert "".join(turns[:1]) in renderers["llama3"].render_text(single)


def test_calls_stay_together_where_the_template_takes_them(renderers: dict[str, ChatRenderer]) -> None:
    messages = [*HELLO, {"role": "assistant", "content": "", "tool_calls": [_call("a"), _call("b")]}]
    assert renderers["qwen"].render_text(messages).count("<|im_start|>assistant") == 2  # the turn, and the next one
