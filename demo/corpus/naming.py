"""Verbs and nouns for tools, known and made up, and how they are written into sentences."""

import re

from . import values, words
from .source import Pair, Source


def made_up(source: Source) -> Pair:
    """Return a word out of its context, with Chinese characters that stand for it in this dialogue only."""
    word = source.lexeme() if source.chance(0.5) else source.invented()
    return (word, values.hanzi(source, 2, 3) if source.chance(0.8) else word)


def make_verb(source: Source) -> Pair:
    """Return a verb, known or not."""
    return made_up(source) if source.chance(0.5) else source.word(words.VERBS)


def make_noun(source: Source) -> Pair:
    """Return a noun, known or not, sometimes with an adjective."""
    noun = made_up(source) if source.chance(0.5) else source.word(words.NOUNS)
    if source.chance(0.2):
        adjective = made_up(source) if source.chance(0.5) else source.word(words.ADJECTIVES)
        return (f"{adjective[0]} {noun[0]}", f"{adjective[1]}{noun[1]}")
    return noun


def article(noun: str) -> str:
    """Return the indefinite article of a noun."""
    return "an" if noun[:1].lower() in tuple("aeiou") else "a"


def apart(text: str) -> str:
    """Mark Latin text in a Chinese sentence, to be set apart from Latin text beside it."""
    return f"\0{text}\0" if text[:1].isascii() or text[-1:].isascii() else text


def spaced(text: str) -> str:
    """Put a space wherever two marked Latin words meet, so that it shows where each ends."""
    return re.sub("\0+", lambda match: _gap(text, match), text).strip()


def _gap(text: str, match: re.Match[str]) -> str:
    before, after = text[: match.start()][-1:], text[match.end() :][:1]
    return " " if before.isascii() and after.isascii() and before.isalnum() and after.isalnum() else ""
