"""What a value is, and how values are written into sentences; the kinds of values are in values.py."""

from typing import NamedTuple

from . import words
from .dialogue import Json
from .resources import common_hanzi
from .source import Language, Source


class Value(NamedTuple):
    """`text` is what the user types, `argument` what the call holds; `spaced` text needs quotes to have clear ends."""

    text: str
    argument: Json
    spaced: bool = False


def same(text: str, *, spaced: bool | None = None) -> Value:
    """Return a value that the call holds as it is typed."""
    return Value(text, text, " " in text if spaced is None else spaced)


def in_language(pair: tuple[str, ...], language: Language) -> str:
    """Return the half of a pair for this language."""
    return pair[1] if language == "zh" else pair[0]


def hanzi(source: Source, low: int, high: int) -> str:
    """Return Chinese characters; one text in eight takes them from the whole block, most of them unseen."""
    kind = source.random.random()
    if kind < 0.12:
        return "".join(chr(source.integer(0x4E00, 0x9FA5)) for _ in range(source.integer(low, high)))
    pool = common_hanzi() if kind < 0.75 else words.GIVEN_ZH
    return "".join(source.choice(pool) for _ in range(source.integer(low, high)))


def quoted(source: Source, language: Language, value: Value) -> str:
    """Write a value into a sentence: quotes for text whose end is not clear, now and then for anything."""
    if not isinstance(value.argument, str) or "'" in value.text or '"' in value.text:
        return value.text
    if not value.spaced and source.chance(0.85):
        return value.text
    quotes = ('""', "''", "“”", "「」", "《》", "“”") if language == "zh" else ('""', "''", "“”", '""', "``")
    marks = source.choice(quotes)
    return f"{marks[0]}{value.text}{marks[1]}"


def joined(language: Language, texts: list[str]) -> str:
    """Enumerate: a, b and c."""
    if len(texts) == 1:
        return texts[0]
    if language == "zh":
        return "、".join(texts[:-1]) + "和" + texts[-1]
    return ", ".join(texts[:-1]) + " and " + texts[-1]
