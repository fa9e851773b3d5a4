"""Checkpoint folders without weights, one per way of calling tools: a byte-level tokenizer, a template, a config.

Token ids 0 to 255 are bytes; the control tokens follow, in the order given.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tokenizers.pre_tokenizers import ByteLevel

from lmdserve.engine.api import Chunk, FinishReason
from lmdserve.tools.hermes import CHAT_TEMPLATE as HERMES_TEMPLATE

# In the manner of Qwen3, which writes and takes reasoning; `opens` is a variable to play models that begin inside it.
QWEN_TEMPLATE = """\
{%- if tools -%}
    {{- '<|im_start|>system\\n<tools>' -}}
    {%- for tool in tools -%}{{- '\\n' + tool | tojson -}}{%- endfor -%}
    {{- '\\n</tools>\\n<tool_call>\\n{"name": <function-name>, "arguments": <args-json-object>}\\n</tool_call>' -}}
    {{- '<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {{- '<|im_start|>' + message.role + '\\n' -}}
    {{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' if message.reasoning_content -}}
    {{- message.content -}}
    {%- for call in message.tool_calls or [] -%}
        {{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' -}}
        {{- call.function.arguments | tojson + '}\\n</tool_call>' -}}
    {%- endfor -%}
    {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
    {{- '<think>\\n' if opens -}}
    {{- '<think>\\n\\n</think>\\n\\n' if enable_thinking is false -}}
{%- endif -%}
"""
CHATML_TEMPLATE = """\
{%- for message in messages -%}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{{- '<|im_start|>assistant\\n' if add_generation_prompt -}}
"""


@dataclass(frozen=True, kw_only=True)
class ToyModel:
    """What makes one toy checkpoint. `control_tokens` says of each whether its tokenizer calls it special."""

    model_type: str
    control_tokens: Mapping[str, bool]
    turn_end: str
    template: str | None = None
    tokenizer_config: Mapping[str, object] | None = None

    def ids(self, text: str) -> list[int]:
        """Return the ids of a text in which control tokens are spelled out."""
        ids: list[int] = []
        while text:
            control = next((token for token in self.control_tokens if text.startswith(token)), None)
            ids += [256 + list(self.control_tokens).index(control)] if control else list(text[0].encode())
            text = text[len(control or text[0]) :]
        return ids

    def answer(
        self, text: str, *, finish: FinishReason = FinishReason.STOP, tokens_a_chunk: int = 1
    ) -> Iterable[Chunk]:
        """Return the chunks of an answer, ended by the turn's end if it stops."""
        ids = self.ids(text + (self.turn_end if finish is FinishReason.STOP else ""))
        for start in range(0, len(ids), tokens_a_chunk):
            is_last = start + tokens_a_chunk >= len(ids)
            yield Chunk(tuple(ids[start : start + tokens_a_chunk]), None, None, 0, finish if is_last else None)

    def write(self, folder: Path) -> Path:
        """Write the checkpoint's files."""
        added = [
            {"id": 256 + place, "content": text, "special": is_special, "single_word": False, "lstrip": False,
             "rstrip": False, "normalized": False}
            for place, (text, is_special) in enumerate(self.control_tokens.items())
        ]  # fmt: skip
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        vocab = {character: byte for byte, character in enumerate(_byte_characters())}
        tokenizer = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
                     "pre_tokenizer": byte_level, "post_processor": None, "decoder": byte_level,
                     "model": {"type": "BPE", "vocab": vocab, "merges": []}}  # fmt: skip
        config = dict(self.tokenizer_config or {}) | ({"chat_template": self.template} if self.template else {})
        config["added_tokens_decoder"] = {str(token["id"]): token for token in added}
        for name, value in (
            ("tokenizer.json", tokenizer),
            ("tokenizer_config.json", config),
            ("config.json", {"model_type": self.model_type}),
            ("generation_config.json", {"temperature": 0.75, "top_k": 40}),
        ):
            (folder / name).write_text(json.dumps(value), encoding="utf-8")
        return folder


def _tokens(special: str, plain: str = "") -> dict[str, bool]:
    return dict.fromkeys(special.split(), True) | dict.fromkeys(plain.split(), False)


_QWEN_TOKENS = _tokens("<|im_start|> <|im_end|>", "<tool_call> </tool_call> <think> </think>")
TOY_MODELS = {
    "qwen": ToyModel(model_type="qwen3", control_tokens=_QWEN_TOKENS, turn_end="<|im_end|>", template=QWEN_TEMPLATE),
    "qwen without tools": ToyModel(
        model_type="qwen2", control_tokens=_QWEN_TOKENS, turn_end="<|im_end|>", template=CHATML_TEMPLATE
    ),
    "hermes, spelled": ToyModel(  # in the manner of models that were taught the format without tokens for its tags
        model_type="mistral",
        control_tokens=_tokens("<|im_start|> <|im_end|>"),
        turn_end="<|im_end|>",
        template=HERMES_TEMPLATE,
    ),
    "llama": ToyModel(
        model_type="llama",
        control_tokens=_tokens(
            "<|begin_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|> <|eom_id|> <|python_tag|>"
        ),
        turn_end="<|eot_id|>",
        tokenizer_config={"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
    ),
    "mistral": ToyModel(
        model_type="mistral",
        control_tokens=_tokens("<s> </s> [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] "
                               "[/TOOL_RESULTS] [TOOL_CALLS] [ARGS] [CALL_ID]"),
        turn_end="</s>",
        tokenizer_config={"bos_token": "<s>", "eos_token": "</s>"},
    ),
    "internlm2": ToyModel(
        model_type="internlm2",
        control_tokens=_tokens(
            "<s> </s> <|im_end|> <|im_start|> <|action_end|> <|action_start|> <|interpreter|> <|plugin|>"
        ),
        turn_end="<|im_end|>",
        tokenizer_config={"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True},
    ),
}  # fmt: skip


def _byte_characters() -> list[str]:
    """Return the character that byte-level BPE writes for each byte, 0 to 255."""
    alphabet = set(ByteLevel.alphabet())
    shown = [byte for byte in range(256) if chr(byte) in alphabet]
    hidden = iter(range(256, 512))
    return [chr(byte) if byte in shown else chr(next(hidden)) for byte in range(256)]
