"""The Jinja environment that chat templates expect, sandboxed. Owns compiling and rendering; knows no template and no
messages.

Checkpoints' templates are written for transformers' `apply_chat_template`: its settings, filters and functions are
reproduced here. Templates are foreign code, so they run in Jinja's sandbox and cannot change what they are given.
"""

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from lmdserve.engine.api import ConfigError


class _GenerationBlocks(jinja2.ext.Extension):
    """Accepts `{% generation %}...{% endgeneration %}`, which only marks what to train on, and renders its body."""

    tags = {"generation"}  # noqa: RUF012  # Jinja's own declaration

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """A compiled chat template."""

    def __init__(self, source: str, *, origin: str) -> None:
        """Compile `source`; ConfigError naming `origin` (a file, or "built-in ...") when it is not a Jinja template."""
        environment = _environment()
        try:
            self._template = environment.from_string(source)
            self.variables = frozenset(jinja2.meta.find_undeclared_variables(environment.parse(source)))
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(
                f"the chat template in {origin} is not valid Jinja (line {error.lineno}: {error.message}); "
                "correct it, or give another with --chat-template"
            ) from error
        self.source = source

    def render(self, variables: Mapping[str, Any]) -> str:
        """Return the rendered text; whatever the template's own code raises comes through."""
        return self._template.render(variables)


def _environment() -> jinja2.Environment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter would escape HTML; prompts need the characters themselves."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(time_format: str) -> str:
    return datetime.now().strftime(time_format)
