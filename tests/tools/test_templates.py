"""Our templates of other families render recorded conversations as the families' own templates do."""

import json
from typing import Any

import jinja2
import pytest

from lmdserve.tools.hermes import CHAT_TEMPLATE as HERMES
from lmdserve.tools.llama import CHAT_TEMPLATE as LLAMA
from lmdserve.tools.mistral import CHAT_TEMPLATE as MISTRAL


def render(template: str, conversation: dict[str, Any], **tokens: str) -> str:
    """Render with transformers' settings, but without its code."""
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)  # prompts, not HTML
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    return environment.from_string(template).render(**conversation, **tokens, add_generation_prompt=True)


@pytest.mark.parametrize("name", ["plain", "no_system", "tools_offered", "tool_round", "parallel_round"])
def test_hermes_is_qwen3(chat_renderings, name):
    expected = chat_renderings["rendered"]["qwen3"]["prompts"][name]
    assert render(HERMES, chat_renderings["conversations"][name]) == expected


@pytest.mark.parametrize("name", ["plain", "no_system", "tools_offered", "tool_round"])
def test_llama(chat_renderings, name):
    expected = chat_renderings["rendered"]["llama3.1"]["prompts"][name]
    if name == "tool_round":  # results are passed on as they are: Llama's own template makes a JSON string of them
        expected = expected.replace('"{\\"temperature\\": 22}"', '{"temperature": 22}')
    assert render(LLAMA, chat_renderings["conversations"][name], bos_token="<|begin_of_text|>") == expected


def test_llama_renders_several_calls_which_its_own_template_refuses(chat_renderings):
    prompt = render(LLAMA, chat_renderings["conversations"]["parallel_round"], bos_token="<|begin_of_text|>")
    first, second = (json.dumps({"name": "get_current_weather", "parameters": {"location": city}})
                     for city in ("Tokyo", "Paris"))  # fmt: skip
    assert f"<|start_header_id|>assistant<|end_header_id|>\n\n{first}; {second}<|eot_id|>" in prompt
    assert prompt.count("<|start_header_id|>ipython<|end_header_id|>") == 2


def test_llama_shows_code_as_code(chat_renderings):
    messages = [
        {"role": "user", "content": "2**9?"},
        {"role": "assistant", "content": "", "tool_calls": [
            {"function": {"name": "code_interpreter", "arguments": {"code": "print(2**9)"}}}]},
        {"role": "tool", "content": "512"},
    ]  # fmt: skip
    prompt = render(LLAMA, {"messages": messages, "builtin_tools": ["code_interpreter"]}, bos_token="")
    assert "Environment: ipython\n" in prompt
    assert "<|python_tag|>print(2**9)<|eom_id|><|start_header_id|>ipython<|end_header_id|>\n\n512<|eot_id|>" in prompt


@pytest.mark.parametrize("name", ["plain", "no_system", "tools_offered"])
def test_mistral_is_nemo(chat_renderings, name):
    expected = chat_renderings["rendered"]["mistral_nemo"]["prompts"][name]
    conversation = chat_renderings["conversations"][name]
    assert render(MISTRAL, conversation, bos_token="<s>", eos_token="</s>") == expected


def test_mistral_quotes_results_and_keeps_the_system_message(chat_renderings):
    conversations, prompts = chat_renderings["conversations"], chat_renderings["rendered"]["mistral_nemo"]["prompts"]
    expected = prompts["parallel_round"].replace('"content": 10', '"content": "10"')
    expected = expected.replace('"content": 20', '"content": "20"')
    assert render(MISTRAL, conversations["parallel_round"], bos_token="<s>", eos_token="</s>") == expected
    with_system = render(MISTRAL, conversations["tool_round"], bos_token="<s>", eos_token="</s>")
    assert "[INST]You are InternLM2-Chat, a harmless AI assistant\n\nI want to know" in with_system
