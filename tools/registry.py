"""Chooses the tool format of a model. Owns the table of families; the formats know nothing of each other."""

import re
from collections.abc import Collection

from .api import ToolFormat
from .internlm2 import InternLM2Format

# Checkpoints converted to the Llama layout keep InternLM2's tokenizer, and with it the format.
_INTERNLM2_MODEL_TYPES = frozenset({"internlm2", "internlm3", "llama"})


def format_for(model_type: str, chat_template: str | None, control_tokens: Collection[str]) -> ToolFormat | None:
    """Return how this model calls tools, or None when it cannot, as far as we know.

    `model_type` is config.json's, `chat_template` the tokenizer's own (None: it has none), `control_tokens` the texts
    of all its control tokens.
    """
    if model_type in _INTERNLM2_MODEL_TYPES and InternLM2Format.control_tokens <= set(control_tokens):
        return InternLM2Format(chat_template=None) if _knows_tools(chat_template) else InternLM2Format()
    return None


def _knows_tools(chat_template: str | None) -> bool:
    return chat_template is not None and re.search(r"\btools\b", chat_template) is not None
