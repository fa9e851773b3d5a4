"""The text side of quantizing and evaluating: a checkpoint's tokenizer and chat template as functions. No torch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from lmdserve.engine.api import ConfigError

from .chat import ChatRenderer, ChatTemplateError
from .text import Tokenizer


class TextEncoders(NamedTuple):
    """What the engine's side needs to turn text into tokens."""

    encode: Callable[[str], list[int]]  # a document, BOS first where the tokenizer puts it there
    encode_chat: Callable[[list[dict[str, Any]]], list[int]] | None  # None: the model has no chat template


def load_encoders(folder: Path, *, chat_template: str | None = None) -> TextEncoders:
    """Read tokenizer and template of a checkpoint folder; ConfigError when one is missing or bad."""
    tokenizer = Tokenizer.load(folder)
    renderer = ChatRenderer.load(
        folder, tokenizer, template_path=None if chat_template is None else Path(chat_template)
    )

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_bos=True)

    def encode_chat(messages: list[dict[str, Any]]) -> list[int]:
        try:
            return renderer.render(messages, add_generation_prompt=False)
        except ChatTemplateError as error:
            raise ConfigError(f"a chat of the text cannot be rendered: {error}") from None

    return TextEncoders(encode, encode_chat if renderer.has_template else None)
