"""Chooses the tool format of a model. Owns the table of families; the formats know nothing of each other."""

import re
from collections.abc import Collection

from .api import ToolFormat
from .hermes import CHAT_TEMPLATE as HERMES_TEMPLATE
from .hermes import TAGS as HERMES_TAGS
from .hermes import HermesFormat
from .internlm2 import InternLM2Format
from .llama import REQUIRED_TOKENS as LLAMA_TOKENS
from .llama import LlamaFormat
from .mistral import CHAT_TEMPLATE as MISTRAL_TEMPLATE
from .mistral import MistralFormat

# Checkpoints converted to the Llama layout keep InternLM2's tokenizer, and with it the format.
_INTERNLM2_MODEL_TYPES = frozenset({"internlm2", "internlm3", "llama"})
_HERMES_MODEL_TYPES = frozenset({"qwen2", "qwen2_moe", "qwen3", "qwen3_moe"})
# Formats that share Hermes' tags and hold something else in them: Qwen3-Coder's and GLM's.
_NOT_HERMES = ("<function=", "<arg_key>")


def format_for(
    model_type: str, chat_template: str | None, control_tokens: Collection[str], *, shows_tools: bool | None = None
) -> ToolFormat | None:
    """Return how this model calls tools, or None when it cannot, as far as we know.

    `model_type` is config.json's, `chat_template` the tokenizer's own (None: it has none), `control_tokens` the texts
    of all its control tokens. `shows_tools` says whether that template shows tools to the model; None: judge by its
    text. Where it does not, the format brings a template of its own.
    """
    tokens, template = frozenset(control_tokens), chat_template or ""
    if shows_tools is None:
        shows_tools = re.search(r"\btools\b", template) is not None
    if shows_tools and _writes_hermes(template):
        return HermesFormat.for_tokens(tokens, chat_template=None)
    if model_type in _INTERNLM2_MODEL_TYPES and InternLM2Format.control_tokens <= tokens:
        return InternLM2Format(chat_template=None) if shows_tools else InternLM2Format()
    if MistralFormat.call_openers <= tokens and _is_of(template, "[INST]", "[TOOL_CALLS]", shows_tools):
        return MistralFormat.for_tokens(tokens, chat_template=None if shows_tools else MISTRAL_TEMPLATE)
    if (
        model_type == "llama"
        and tokens >= LLAMA_TOKENS
        and _is_of(template, "<|start_header_id|>", "ipython", shows_tools)
    ):
        return LlamaFormat(chat_template=None) if shows_tools else LlamaFormat()
    if (
        model_type in _HERMES_MODEL_TYPES
        and tokens >= HERMES_TAGS
        and _is_of(template, "<|im_start|>", "", shows_tools)
    ):
        return None if shows_tools else HermesFormat.for_tokens(tokens, chat_template=HERMES_TEMPLATE)
    return None


def _writes_hermes(template: str) -> bool:
    return "<tool_call>" in template and "arguments" in template and not any(mark in template for mark in _NOT_HERMES)


def _is_of(template: str, turn_mark: str, tool_mark: str, shows_tools: bool) -> bool:
    """Whether the template is of the family that writes these marks; models without a template may be."""
    return not template or (turn_mark in template and (not shows_tools or tool_mark in template))
