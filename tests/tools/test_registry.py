"""Which model gets which tool format."""

import pytest

from lmdserve.tools.internlm2 import CHAT_TEMPLATE, InternLM2Format
from lmdserve.tools.registry import format_for

TOKENS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|action_start|>", "<|action_end|>"]
TOKENS += ["<|plugin|>", "<|interpreter|>"]
HUB_TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}"
TOOL_TEMPLATE = "{% if tools %}{{ tools | tojson }}{% endif %}" + HUB_TEMPLATE


@pytest.mark.parametrize("model_type", ["internlm2", "internlm3", "llama"])
@pytest.mark.parametrize(
    ("own_template", "template"), [(None, CHAT_TEMPLATE), (HUB_TEMPLATE, CHAT_TEMPLATE), (TOOL_TEMPLATE, None)]
)
def test_internlm2_by_type_and_tokens(model_type, own_template, template):
    chosen = format_for(model_type, own_template, TOKENS)
    assert chosen == InternLM2Format(chat_template=template)
    assert chosen.name == "internlm2"
    assert chosen.control_tokens <= set(TOKENS)


@pytest.mark.parametrize(
    ("model_type", "control_tokens"),
    [("internlm2", TOKENS[:-1]), ("internlm2", []), ("qwen2", TOKENS), ("internlm", TOKENS)],
)
def test_none_for_models_that_lack_the_tokens_or_are_of_another_family(model_type, control_tokens):
    assert format_for(model_type, None, control_tokens) is None
