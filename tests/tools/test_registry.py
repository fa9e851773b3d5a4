"""Which model gets which tool format."""

import pytest

from lmdserve.tools.hermes import CHAT_TEMPLATE as HERMES_TEMPLATE
from lmdserve.tools.internlm2 import CHAT_TEMPLATE, InternLM2Format
from lmdserve.tools.llama import CHAT_TEMPLATE as LLAMA_TEMPLATE
from lmdserve.tools.mistral import CHAT_TEMPLATE as MISTRAL_TEMPLATE
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


CHATML = "{{ '<|im_start|>' + messages[0].content }}"
QWEN = CHATML + """{{ tools }} <tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>"""
QWEN_CODER = CHATML + "{{ tools }} <tool_call>\n<function=f>\n<parameter=x>{{ arguments }}</parameter></function>"
GLM = "{{ tools }} <tool_call>f<arg_key>x</arg_key><arg_value>{{ arguments }}</arg_value></tool_call>"
LLAMA = "{{ '<|start_header_id|>' + messages[0].content }}"
LLAMA_WITH_TOOLS = LLAMA + "{% if tools %}Environment: ipython{{ tools }}{% endif %}"
NEMOTRON = LLAMA + "{{ tools }}<TOOLCALL>{{ arguments }}</TOOLCALL>"
MISTRAL = "{{ '[INST]' + messages[0].content }}"
MISTRAL_WITH_TOOLS = MISTRAL + "{{ '[AVAILABLE_TOOLS]' + tools }}[TOOL_CALLS]"
DEEPSEEK = "{{ '<｜User｜>' + messages[0].content }}"

QWEN_TOKENS = ["<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>"]
LLAMA_TOKENS = ["<|begin_of_text|>", "<|start_header_id|>", "<|eot_id|>", "<|eom_id|>", "<|python_tag|>"]
MISTRAL_TOKENS = ["<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]"]


@pytest.mark.parametrize(
    ("model_type", "own_template", "control_tokens", "name", "template"),
    [
        ("qwen2", QWEN, QWEN_TOKENS, "hermes", None),
        ("qwen3", QWEN, QWEN_TOKENS, "hermes", None),
        ("qwen2", CHATML, QWEN_TOKENS, "hermes", HERMES_TEMPLATE),
        ("qwen3", None, QWEN_TOKENS, "hermes", HERMES_TEMPLATE),
        ("llama", QWEN, ["<|im_start|>", "<|im_end|>"], "hermes", None),
        ("llama", QWEN, LLAMA_TOKENS, "hermes", None),
        ("internlm2", QWEN, TOKENS, "hermes", None),
        ("llama", LLAMA_WITH_TOOLS, LLAMA_TOKENS, "llama3", None),
        ("llama", LLAMA, LLAMA_TOKENS, "llama3", LLAMA_TEMPLATE),
        ("llama", None, LLAMA_TOKENS, "llama3", LLAMA_TEMPLATE),
        ("mistral", MISTRAL_WITH_TOOLS, MISTRAL_TOKENS, "mistral", None),
        ("mistral", MISTRAL, MISTRAL_TOKENS, "mistral", MISTRAL_TEMPLATE),
        ("mixtral", None, MISTRAL_TOKENS, "mistral", MISTRAL_TEMPLATE),
    ],
)
def test_by_template_and_tokens(model_type, own_template, control_tokens, name, template):
    chosen = format_for(model_type, own_template, control_tokens)
    assert chosen is not None
    assert (chosen.name, chosen.chat_template) == (name, template)
    assert chosen.call_openers <= chosen.control_tokens <= set(control_tokens)


@pytest.mark.parametrize(
    ("model_type", "own_template", "control_tokens"),
    [
        ("qwen3", QWEN_CODER, QWEN_TOKENS),  # other contents in the same tags
        ("glm4", GLM, QWEN_TOKENS),
        ("qwen2", CHATML, QWEN_TOKENS[:2]),
        ("qwen2", DEEPSEEK, QWEN_TOKENS),  # distilled into Qwen: its tokens, another's turns
        ("llama", DEEPSEEK, LLAMA_TOKENS),
        ("llama", NEMOTRON, LLAMA_TOKENS),  # Llama's turns and tokens, calls in tags of its own
        ("llama", LLAMA, LLAMA_TOKENS[:4]),  # Llama 3 without the tag of 3.1
        ("mistral", MISTRAL, MISTRAL_TOKENS[:4]),
        ("mistral", DEEPSEEK, MISTRAL_TOKENS),
        ("mistral", MISTRAL + "{{ tools }}", MISTRAL_TOKENS),
    ],
)
def test_none_where_nothing_is_known(model_type, own_template, control_tokens):
    assert format_for(model_type, own_template, control_tokens) is None


def test_what_a_template_shows_counts_more_than_what_it_mentions():
    mentions = LLAMA + "{% set ignored = tools %}Environment: ipython"
    assert format_for("llama", mentions, LLAMA_TOKENS).chat_template is None
    assert format_for("llama", mentions, LLAMA_TOKENS, shows_tools=False).chat_template == LLAMA_TEMPLATE
