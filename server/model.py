"""The model as the HTTP side sees it: its names, its text side, and its makers' sampling defaults. No weights here."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .chat import ChatRenderer
from .generation_defaults import load_generation_defaults
from .text import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """One checkpoint under the name that clients use."""

    name: str
    checkpoint: str  # what the checkpoint itself is called
    folder: Path  # absolute, without links
    created: int  # Unix time, s
    tokenizer: Tokenizer
    renderer: ChatRenderer
    default_sampling: Mapping[str, float | int]


def load_served_model(
    folder: Path, *, name: str, chat_template: str | None, checkpoint: str | None = None
) -> ServedModel:
    """Read tokenizer, template and sampling defaults from a checkpoint folder; ConfigError when one is missing or bad.

    `chat_template` is the path of a template file to use instead of the model's own; `checkpoint` is what the
    checkpoint is called, if not by its folder's name.
    """
    tokenizer = Tokenizer.load(folder)
    template_path = None if chat_template is None else Path(chat_template)
    return ServedModel(
        name=name,
        checkpoint=checkpoint or folder.name,
        folder=folder.resolve(),
        created=int(time.time()),
        tokenizer=tokenizer,
        renderer=ChatRenderer.load(folder, tokenizer, template_path=template_path),
        default_sampling=load_generation_defaults(folder),
    )
