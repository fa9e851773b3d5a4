"""Where chat templates come from: a checkpoint's files, else a built-in for families whose older checkpoints have none.

Owns the built-ins and the precedence of files. InternLM2's template is not here but with its tool format, in tools.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

from lmdserve.engine.api import ConfigError

from .model_folder import read_json_object


class TemplateSource(NamedTuple):
    """A template's text, and where it is from, for error messages."""

    text: str
    origin: str


# InternLM 1: plain-text role marks, one token (<eoa>) at the end of an answer.
INTERNLM = """\
{{- bos_token -}}
{%- for message in messages -%}
    {%- if message.role == 'system' -%}
        {{- '<|System|>:' + message.content + '\\n' -}}
    {%- elif message.role == 'user' -%}
        {{- '<|User|>:' + message.content + '\\n' -}}
    {%- elif message.role == 'assistant' -%}
        {{- '<|Bot|>:' + message.content + '<eoa>\\n' -}}
    {%- else -%}
        {{- raise_exception('InternLM knows the roles system, user and assistant, not ' + message.role) -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|Bot|>:' -}}
{%- endif -%}
"""

CHATML = """\
{{- bos_token -}}
{%- for message in messages -%}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""

# Llama 2 (also CodeLlama, and Mistral before it shipped a template): the system text goes into the first user turn.
LLAMA2 = """\
{%- set turns = messages[1:] if messages[0].role == 'system' else messages -%}
{%- for message in turns -%}
    {%- if message.role != ('user' if loop.index0 is even else 'assistant') -%}
        {{- raise_exception('Llama 2 takes user and assistant messages in turn, after an optional system message') -}}
    {%- endif -%}
    {%- if message.role == 'assistant' -%}
        {{- ' ' + message.content | trim + ' ' + eos_token -}}
    {%- elif loop.first and messages[0].role == 'system' -%}
        {{- bos_token + '[INST] <<SYS>>\\n' + messages[0].content | trim + '\\n<</SYS>>\\n\\n' -}}
        {{- message.content | trim + ' [/INST]' -}}
    {%- else -%}
        {{- bos_token + '[INST] ' + message.content | trim + ' [/INST]' -}}
    {%- endif -%}
{%- endfor -%}
"""

LLAMA3 = """\
{{- bos_token -}}
{%- for message in messages -%}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
{%- endif -%}
"""


def checkpoint_templates(folder: Path) -> dict[str, TemplateSource]:
    """Return the templates that a checkpoint carries, by name; most carry none or one, called "default".

    A `chat_template.jinja` is the newest form and wins over `chat_template.json`, and that over tokenizer_config.json.
    """
    jinja_path = folder / "chat_template.jinja"
    if jinja_path.is_file():
        return {"default": read_template(jinja_path)}
    for name in ("chat_template.json", "tokenizer_config.json"):
        value = read_json_object(folder / name).get("chat_template")
        if value is not None:
            return _named_templates(value, str(folder / name))
    return {}


def read_template(path: Path) -> TemplateSource:
    """Return the template in a file of its own; ConfigError when it cannot be read."""
    try:
        return TemplateSource(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"the chat template {path} cannot be read ({error}); give a text file with --chat-template"
        ) from error


def builtin_template(model_type: str, control_tokens: Collection[str]) -> TemplateSource | None:
    """Return the template of a family whose checkpoints may lack one, recognised by its control tokens, or None."""
    if model_type == "internlm":
        return TemplateSource(INTERNLM, "built-in InternLM template")
    if {"<|im_start|>", "<|im_end|>"} <= set(control_tokens):
        return TemplateSource(CHATML, "built-in ChatML template")
    if {"<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"} <= set(control_tokens):
        return TemplateSource(LLAMA3, "built-in Llama 3 template")
    if model_type in ("llama", "mistral") and {"<s>", "</s>"} <= set(control_tokens):
        return TemplateSource(LLAMA2, "built-in Llama 2 template")
    return None


def _named_templates(value: Any, origin: str) -> dict[str, TemplateSource]:
    match value:
        case str():
            return {"default": TemplateSource(value, origin)}
        case [*entries]:
            named = {
                entry["name"]: TemplateSource(entry["template"], origin)
                for entry in entries
                if isinstance(entry, dict) and isinstance(entry.get("template"), str) and "name" in entry
            }
            if len(named) == len(entries) and "default" in named:
                return named
    raise ConfigError(
        f"{origin}: chat_template is neither a string nor a list of named templates with one called 'default'; "
        "correct it, or give a template with --chat-template"
    )
