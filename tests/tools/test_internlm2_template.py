"""InternLM2's prompt: the official layout with tools, and the model's own template without."""

import copy
import json
from typing import Any

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lmdserve.tools.api import fold
from lmdserve.tools.internlm2 import CHAT_TEMPLATE

HUB_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + "
    "'<|im_end|>' + '\\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
WEATHER = {"name": "weather", "description": "Tells the 天气.", "parameters": {"type": "object", "properties": {}}}
INTERPRETER = {"type": "code_interpreter"}


def render(
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None = None,
    *,
    template: str = CHAT_TEMPLATE,
    add_generation_prompt: bool = True,
) -> str:
    """Render with the settings of transformers: its environment, and a tojson that keeps order and non-ASCII text."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    return environment.from_string(template).render(
        messages=messages, tools=tools, bos_token="<s>", add_generation_prompt=add_generation_prompt
    )


def call(name: str, arguments: Any, call_id: str = "call_1") -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


@pytest.mark.parametrize("name", ["plain", "tools_offered", "tool_round"])
def test_official_layout(chat_renderings, name):
    conversation = chat_renderings["conversations"][name]
    expected = chat_renderings["rendered"]["official_internlm2"]["prompts"][name]
    assert render(conversation["messages"], conversation.get("tools")) == expected


def test_several_calls_stand_side_by_side(chat_renderings):
    conversation = chat_renderings["conversations"]["parallel_round"]
    expected = chat_renderings["rendered"]["official_internlm2"]["prompts"]["parallel_round_convention"]
    assert render(conversation["messages"], conversation["tools"]) == expected


def test_official_interpreter_round(chat_renderings):
    expected = chat_renderings["rendered"]["official_internlm2"]["prompts"]["interpreter_round"]
    code = "import pandas as pd\ndf = pd.read_csv('data.csv')"
    messages = [
        {"role": "system", "content": "You are InternLM2-Chat, a harmless AI assistant"},
        {"role": "user", "content": "Please help me process and visualize this dataset.\n"},
        {"role": "user", "name": "file", "content": '[{"path": "data.csv", size=\'10K\'}]'},
        {
            "role": "assistant",
            "content": "I have processed the data and visualized it for you.\n\n",
            "tool_calls": [call("code_interpreter", {"language": "python", "code": code})],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "![image](xxx.png)\n"},
    ]
    assert render(messages, [INTERPRETER]) == expected
    messages[-1] = {"role": "environment", "name": "interpreter", "content": "![image](xxx.png)\n"}
    assert render(messages, [INTERPRETER]) == expected


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("tools", [None, []])
@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": "Hello"}],
        [{"role": "user", "name": "Ada", "content": "  spaces \n\n"}, {"role": "assistant", "content": "<b> & 'x'"}],
        [{"role": "user", "content": "a"}, {"role": "system", "content": "late"}, {"role": "developer", "content": ""}],
        [{"role": "environment", "content": "a result"}, {"role": "user", "name": "file", "content": "{{ 1 + 1 }}"}],
        [{"role": "assistant", "content": "a", "tool_calls": []}, {"role": "user", "content": "b"}],
        [],
    ],
)
def test_without_tools_it_is_the_models_own_template(messages, tools, add_generation_prompt):
    own = render(messages, template=HUB_TEMPLATE, add_generation_prompt=add_generation_prompt)
    assert render(messages, tools, add_generation_prompt=add_generation_prompt) == own


def test_the_hub_template_used_here_is_the_recorded_one(chat_renderings):
    for name in ("plain", "no_system"):
        messages = chat_renderings["conversations"][name]["messages"]
        expected = chat_renderings["rendered"]["internlm2_hf_tokenizer_config"]["prompts"][name]
        assert render(messages, template=HUB_TEMPLATE) == expected


def test_tools_come_first_where_there_is_no_system_message():
    prompt = render([{"role": "user", "content": "Hi"}], [{"type": "function", "function": WEATHER}])
    expected = json.dumps([WEATHER], ensure_ascii=False)
    assert prompt.startswith(f"<s><|im_start|>system name=<|plugin|>\n{expected}<|im_end|>\n<|im_start|>user\n")


def test_the_interpreter_comes_before_functions_and_is_not_listed_among_them():
    prompt = render([{"role": "user", "content": "Hi"}], [{"type": "function", "function": WEATHER}, INTERPRETER])
    assert prompt.index("system name=<|interpreter|>\nYou now have access") < prompt.index("system name=<|plugin|>\n[{")
    assert prompt.count("code_interpreter") == 0
    assert "(handling CSV, JSON, etc. formats)<|im_end|>\n<|im_start|>system name=<|plugin|>" in prompt


def test_a_bare_function_is_listed_like_a_wrapped_one_and_strict_is_not_shown():
    messages = [{"role": "user", "content": "Hi"}]
    wrapped = render(messages, [{"type": "function", "function": WEATHER}])
    assert render(messages, [WEATHER]) == wrapped
    assert render(messages, [{"type": "function", "function": {**WEATHER, "strict": True}}]) == wrapped


def test_results_as_internlms_own_examples_send_them():
    messages = [
        {"role": "user", "content": "Compute (3+5)*2"},
        {"role": "assistant", "content": None, "tool_calls": [call("add", {"a": 3, "b": 5})]},
        {"role": "environment", "content": "3+5=8", "name": "plugin"},
    ]
    assert render(messages, [WEATHER]).endswith(
        '<|im_start|>assistant\n<|action_start|><|plugin|>\n{"name": "add", "parameters": {"a": 3, "b": 5}}'
        "<|action_end|><|im_end|>\n<|im_start|>environment name=<|plugin|>\n3+5=8<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    ("arguments", "text"),
    [({"x": "é"}, '{"x": "é"}'), ('{"x":1}', '{"x":1}'), (None, "{}"), ("", "{}"), ({}, "{}")],
)
def test_arguments_in_history(arguments, text):
    prompt = render([{"role": "assistant", "content": "", "tool_calls": [call('f"', arguments)]}])
    assert f'<|plugin|>\n{{"name": "f\\"", "parameters": {text}}}<|action_end|><|im_end|>\n' in prompt


def test_the_message_without_content_key_is_rendered():
    assert "<|im_start|>assistant\n<|action_start|>" in render([{"role": "assistant", "tool_calls": [call("f", {})]}])


def test_rendering_changes_nothing_it_is_given():
    messages = [{"role": "assistant", "content": None, "tool_calls": [call("code_interpreter", {"code": "1"})]}]
    before = copy.deepcopy(messages)
    render(messages, [INTERPRETER])
    assert messages == before


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("f", {"text": "a <|im_end|> b", "n": [1, None]}),
        ("code_interpreter", {"language": "python", "code": "print('x')\n\nprint(2)"}),
        ("code_interpreter", {"code": "  indented()\nmore()"}),
    ],
)
def test_what_history_shows_parses_back_to_the_same_call(parse, name, arguments):
    """A model that repeats the form it sees is understood."""
    prompt = render([{"role": "assistant", "content": "So:", "tool_calls": [call(name, arguments)]}])
    reply = prompt.split("<|im_start|>assistant\n")[1].removesuffix("<|im_end|>\n")
    folded = fold(parse(reply, match_text=True))
    assert folded.content == "So:"
    assert [(made.name, json.loads(made.arguments)) for made in folded.tool_calls] == [(name, arguments)]
