"""Reads catalogue.txt: tools people really offer, with the ways they are asked for.

A block has `names:` (function names), `en:` and `zh:` (descriptions, separated by |), `param:` lines and requests
(`ask:` English, `问:` Chinese). A parameter line is: key (with * when required) and the names it may have | its kind,
`list:kind`, or the words of an enum as english=chinese | English descriptions ; ... | Chinese descriptions ; ...
In a request {key} is the value, [...] a part said only when all its values are given, and [?key yes|no] a boolean.
`held-out` marks a block that training never sees.
"""

import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from .source import Language, Pair, Split


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of a concept; `enum` is empty unless the kind is "enum"."""

    key: str
    names: tuple[str, ...]
    kind: str
    required: bool
    enum: tuple[Pair, ...]
    descriptions: dict[Language, tuple[str, ...]]


@dataclass(slots=True)
class Concept:
    """A tool under all the names it goes by."""

    split: Split
    names: tuple[str, ...] = ()
    descriptions: dict[Language, tuple[str, ...]] = field(default_factory=dict)
    parameters: list[Parameter] = field(default_factory=list)
    requests: dict[Language, list[str]] = field(default_factory=lambda: {"en": [], "zh": []})


@cache
def concepts(split: Split) -> tuple[Concept, ...]:
    """Return the concepts of one split."""
    text = (Path(__file__).parent / "catalogue.txt").read_text(encoding="utf-8")
    blocks = [block for block in re.split(r"\n\s*\n", text) if "names:" in block]
    parsed = (_parse(block) for block in blocks)
    return tuple(concept for concept in parsed if concept.split is split)


def _parse(block: str) -> Concept:
    lines = block.strip().splitlines()
    concept = Concept(Split.HELD_OUT if "held-out" in lines else Split.TRAIN)
    for line in lines:
        tag, _, rest = line.partition(": ")
        if tag == "names":
            concept.names = tuple(rest.split())
        elif tag in ("en", "zh"):
            concept.descriptions[tag] = tuple(part.strip() for part in rest.split(" | "))
        elif tag == "param":
            concept.parameters.append(_parse_parameter(rest))
        elif tag in ("ask", "问"):
            concept.requests["en" if tag == "ask" else "zh"].append(rest)
    return concept


def _parse_parameter(text: str) -> Parameter:
    head, kind, english, chinese = (part.strip() for part in text.split(" | "))
    key, *names = head.split()
    enum = tuple(tuple(pair.split("=")) for pair in re.findall(r"[^=]+=\S+", kind)) if "=" in kind else ()
    return Parameter(
        key=key.rstrip("*"),
        names=tuple(names),
        kind="enum" if enum else kind,
        required=key.endswith("*"),
        enum=tuple((word.strip(), chinese_word) for word, chinese_word in enum),
        descriptions={"en": tuple(english.split(" ; ")), "zh": tuple(chinese.split(" ; "))},
    )
