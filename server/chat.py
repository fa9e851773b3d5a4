"""Messages -> the token ids of a prompt, through the model's chat template. Owns which template renders a
conversation, and the rule that control tokens come from the template alone. Tool schemas and answers are others' work.

User data (contents, names, arguments, schemas) is covered before rendering (provenance.py), so a typed `<|im_end|>`
stays text. The one exception: `<think>` and `</think>` in an assistant message are what the model itself wrote, and
templates look for them. Marks that a family writes as ordinary text (`[INST]`, `<|User|>:`) are no tokens, and nothing
can tell a typed one from a rendered one.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jinja2

from lmdserve.tools.api import ControlToken, ToolFormat
from lmdserve.tools.reasoning import END, START, ReasoningFormat, reasoning_format_for
from lmdserve.tools.registry import format_for

from .chat_messages import ChatTemplateError, one_call_a_turn, template_messages
from .model_folder import read_json_object
from .provenance import ControlTokenShield
from .template_env import ChatTemplate
from .templates import TemplateSource, builtin_template, checkpoint_templates, read_template
from .text import Tokenizer

__all__ = ["ChatRenderer", "ChatTemplateError", "Prompt"]

logger = logging.getLogger(__name__)

_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<eoa>", "<|end|>", "<end_of_turn>")
_REASONING_MARKS = frozenset({START, END})
_BUILTIN_TOOLS = "builtin_tools"  # Llama's variable: tools that the model knows by name
_PROBE_NAME = "probe_7f3a9c"  # of a tool that a template shows, or does not
_NO_VARIABLES: Mapping[str, Any] = MappingProxyType({})


class Prompt(NamedTuple):
    """A rendered conversation."""

    text: str  # real and typed control tokens look alike in it
    token_ids: list[int]
    opens_in_reasoning: bool  # the model goes on inside a reasoning block


class ChatRenderer:
    """Renders conversations for one model. Immutable and safe to share between threads."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        template: ChatTemplate | None,
        offer_template: ChatTemplate | None,
        history_template: ChatTemplate | None,
        tool_format: ToolFormat | None,
        reasoning_format: ReasoningFormat | None,
    ) -> None:
        """`offer_template` renders what offers tools, `history_template` what only has calls or results in it."""
        self._tokenizer = tokenizer
        self._template = template
        self._offer_template = offer_template
        self._history_template = history_template
        self._shield = ControlTokenShield(tokenizer.control_tokens)
        self.tool_format = tool_format
        self.reasoning_format = reasoning_format
        self.stop_token_ids = frozenset(
            tokenizer.control_tokens[text] for text in _TURN_ENDS if text in tokenizer.control_tokens
        )

    @classmethod
    def load(cls, folder: Path, tokenizer: Tokenizer, *, template_path: Path | None = None) -> "ChatRenderer":
        """Choose the templates of a checkpoint: the file given, else its own, else a built-in of its family.

        A model without any is no error here (base models complete text); rendering then is one.
        """
        model_type = str(read_json_object(folder / "config.json").get("model_type", ""))
        sources = {"default": read_template(template_path)} if template_path else checkpoint_templates(folder)
        own, own_for_tools = sources.get("default"), sources.get("tool_use", sources.get("default"))
        tool_format = format_for(
            model_type,
            own_for_tools.text if own_for_tools else None,
            tokenizer.control_tokens.keys(),
            shows_tools=_shows_tools(_compiled(own_for_tools), tokenizer.named_tokens),
        )
        ours = None
        if tool_format is not None and tool_format.chat_template is not None and template_path is None:
            ours = TemplateSource(tool_format.chat_template, f"built-in {tool_format.name} template")
        default = own or ours or builtin_template(model_type, tokenizer.control_tokens)
        if own is None:
            logger.info("no chat template in %s: using %s", folder, default.origin if default else "none")
        elif ours is not None:
            logger.info("%s drops tools: requests with tools use the %s", own.origin, ours.origin)
        template, tool_template = _compiled(default), _compiled(ours or sources.get("tool_use"))
        return cls(
            tokenizer,
            template=template,
            offer_template=tool_template or template,
            # A checkpoint's own template for tools counts on there being some.
            history_template=(tool_template if ours else None) or template,
            tool_format=tool_format,
            reasoning_format=reasoning_format_for(default.text if default else None, tokenizer.control_tokens.keys()),
        )

    @property
    def has_template(self) -> bool:
        """False for base models, which complete text and have no conversations."""
        return self._template is not None

    def render(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
        """Return the prompt's token ids; options and errors are those of `prepare`."""
        return self._tokenizer.encode_segments(self._segments(messages, **options))

    def render_text(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """Return the prompt as text, for people: real and typed control tokens look alike in it."""
        return "".join(self._segments(messages, **options))

    def prepare(
        self, messages: Sequence[Mapping[str, Any]], *, max_tokens: int | None = None, **options: Any
    ) -> Prompt:
        """Return the whole prompt; ChatTemplateError names what cannot be rendered, TextTooLongError what is too long.

        The options are `tools`; `continue_final_message`, which leaves the last message, an assistant's, open for the
        model to go on with it; `add_generation_prompt`, by default true, which otherwise opens a new assistant turn;
        and `template_kwargs`, further variables for the template (`enable_thinking`), of which one that it does not use
        is an error.
        """
        segments = self._segments(messages, **options)
        is_continued = options.get("continue_final_message")
        continued = template_messages(messages[-1:], knows_environment=True)[0]["content"] if is_continued else ""
        return Prompt(
            text="".join(segments),
            token_ids=self._tokenizer.encode_segments(segments, max_tokens=max_tokens),
            opens_in_reasoning=self.reasoning_format is not None and _ends_in_reasoning(segments, continued),
        )

    def _segments(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] = _NO_VARIABLES,
    ) -> list[str | ControlToken]:
        template = self._template_for(messages, tools)
        prepared = template_messages(messages, knows_environment="environment" in template.source)
        try:
            variables = {
                **self._checked_variables(template, template_kwargs),
                **self._tokenizer.named_tokens,
                "messages": self._covered_messages(prepared, continue_final_message=continue_final_message),
                "documents": None,
                "add_generation_prompt": add_generation_prompt and not continue_final_message,
            }
            rendered = _render(template, self._with_tools(variables, tools))
        except ChatTemplateError:
            raise
        except RecursionError as error:
            raise ChatTemplateError("messages or tools are nested too deeply to be rendered", "messages") from error
        except Exception as error:  # a template is foreign code, and raises what it likes
            raise ChatTemplateError(f"the model's chat template refuses these messages: {error}", "messages") from error
        if continue_final_message:
            rendered = self._cut_at_end_mark(rendered)
        segments = self._tokenizer.split_control(rendered)
        return [s if isinstance(s, ControlToken) else self._shield.uncover(s) for s in segments]

    def _with_tools(self, variables: dict[str, Any], tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        covered = self._shield.cover(list(tools))
        if self.tool_format is None:
            return {**variables, "tools": covered or None}
        offer = self.tool_format.template_variables(covered)
        if isinstance(variables.get(_BUILTIN_TOOLS), list) and _BUILTIN_TOOLS in offer:
            offer[_BUILTIN_TOOLS] = [*variables[_BUILTIN_TOOLS], *offer[_BUILTIN_TOOLS]]
        return {**variables, **offer}

    def _template_for(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> ChatTemplate:
        if tools:
            template = self._offer_template
        else:
            template = self._history_template if any(map(_is_about_tools, messages)) else self._template
        if template is None:
            raise ChatTemplateError(
                "this model has no chat template and cannot take messages; use /v1/completions, "
                "or start the server with --chat-template",
                "messages",
            )
        if tools and "tools" not in template.variables:
            raise ChatTemplateError("this model's chat template does not take tools; send none", "tools")
        return template

    def _covered_messages(
        self, messages: Sequence[Mapping[str, Any]], *, continue_final_message: bool
    ) -> list[dict[str, Any]]:
        covered = [self._covered_message(self._with_own_call_ids(message)) for message in messages]
        if continue_final_message:
            if messages[-1]["role"] != "assistant" or messages[-1].get("tool_calls"):
                raise ChatTemplateError(
                    "only a last message of the assistant, without tool_calls, can be continued",
                    f"messages[{len(messages) - 1}]",
                )
            covered[-1]["content"] += self._shield.end_mark
        return covered

    def _with_own_call_ids(self, message: Mapping[str, Any]) -> Mapping[str, Any]:
        if self.tool_format is None:
            return message
        rewrite = self.tool_format.template_call_id
        changes: dict[str, Any] = {}
        if isinstance(message.get("tool_call_id"), str):
            changes["tool_call_id"] = rewrite(message["tool_call_id"])
        if "tool_calls" in message:
            changes["tool_calls"] = [
                {**call, "id": rewrite(call["id"])} if isinstance(call.get("id"), str) else call
                for call in message["tool_calls"]
            ]
        return {**message, **changes}

    def _covered_message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        return {
            key: value if key == "role" else self._shield.cover(value, allowed=_allowed_marks(message["role"], key))
            for key, value in message.items()
        }

    def _checked_variables(self, template: ChatTemplate, template_kwargs: Mapping[str, Any]) -> dict[str, Any]:
        reserved = {"messages", "tools", "documents", "add_generation_prompt", *self._tokenizer.named_tokens}
        for name in template_kwargs:
            if name in reserved or name not in template.variables:
                usable = ", ".join(sorted(template.variables - reserved)) or "none"
                raise ChatTemplateError(
                    f"chat_template_kwargs.{name} is not a variable of this model's chat template (it has: {usable})",
                    f"chat_template_kwargs.{name}",
                )
        return {name: self._shield.cover(value) for name, value in template_kwargs.items()}

    def _cut_at_end_mark(self, rendered: str) -> str:
        end = rendered.rfind(self._shield.end_mark)
        if end < 0:
            raise ChatTemplateError("this model's chat template hides the last message's text", "messages")
        return rendered[:end]


def _render(template: ChatTemplate, variables: dict[str, Any]) -> str:
    try:
        return template.render(variables)
    except jinja2.TemplateError:
        if all(len(message.get("tool_calls", ())) < 2 for message in variables["messages"]):
            raise
    return template.render({**variables, "messages": one_call_a_turn(variables["messages"])})


def _compiled(source: TemplateSource | None) -> ChatTemplate | None:
    return None if source is None else ChatTemplate(source.text, origin=source.origin)


def _shows_tools(template: ChatTemplate | None, named_tokens: Mapping[str, str]) -> bool:
    """Whether the template shows tools that are offered to the model, found out by offering one."""
    if template is None:
        return False
    function = {"name": _PROBE_NAME, "description": "", "parameters": {"type": "object", "properties": {}}}
    variables = {
        **named_tokens,
        "messages": [{"role": "user", "content": ""}],
        "tools": [{"type": "function", "function": function}],
        "documents": None,
        "add_generation_prompt": True,
    }
    try:
        return _PROBE_NAME in template.render(variables)
    except Exception:  # a template is foreign code; one that wants more than this is judged by its text
        return "tools" in template.variables


def _ends_in_reasoning(segments: Sequence[str | ControlToken], continued: str) -> bool:
    """Whether the model goes on inside a reasoning block: opened by the template last of all, or in `continued`."""
    if START in continued or END in continued:
        return continued.rfind(START) > continued.rfind(END)
    return "".join(segments[-2:]).rstrip().endswith(START)


def _allowed_marks(role: str, key: str) -> frozenset[str]:
    is_models_own_text = role == "assistant" and key in ("content", "reasoning_content")
    return _REASONING_MARKS if is_models_own_text else frozenset()


def _is_about_tools(message: Mapping[str, Any]) -> bool:
    return message.get("role") in ("tool", "environment") or bool(message.get("tool_calls"))
