"""Codes, paths, code-like text, titles and sentences. One function per kind, all of one signature."""

import string

from . import words
from .plain_values import invented, person, time
from .resources import by_language
from .source import Language, Source
from .value import Value, hanzi, in_language, same


def code(source: Source, language: Language) -> Value:
    """An identifier such as INV-20391, 7f3a91, AB12CD."""
    upper = source.string(string.ascii_uppercase, 1, 4)
    digits = source.string(string.digits, 2, 7)
    mixed = source.string(string.ascii_lowercase + string.digits, 4, 10)
    forms = (
        f"{upper}-{digits}",
        f"{upper}{digits}",
        digits,
        mixed,
        source.string(string.ascii_uppercase + string.digits, 4, 9),
        f"{source.invented()}-{digits}",
        f"{source.invented()}_{digits}",
        f"#{digits}",
        f"{upper}-{digits}-{source.string(string.ascii_uppercase, 1, 2)}",
    )
    return same(source.choice(forms))


def digits(source: Source, language: Language) -> Value:
    """A number used as a name: the schema may call it a string or an integer."""
    return same(source.choice("123456789") + source.string(string.digits, 2, 8))


def url(source: Source, language: Language) -> Value:
    path = "/".join(source.invented() for _ in range(source.integer(0, 2)))
    prefix = source.choice(("", "www.", "api."))
    domain = source.choice(("com", "org", "io", "dev", "cn"))
    return same(f"https://{prefix}{source.invented()}.{domain}/{path}".rstrip("/"))


def path(source: Source, language: Language) -> Value:
    name = source.invented() + source.choice(
        (".txt", ".csv", ".json", ".py", ".pdf", ".png", ".log", "", ".tar.gz", ".md")
    )
    folders = [
        source.choice((source.invented(), "home", "data", "tmp", "src", "var")) for _ in range(source.integer(0, 3))
    ]
    return same(source.choice(("/", "./", "~/", "", "C:/")) + "/".join([*folders, name]))


def file(source: Source, language: Language) -> Value:
    stem = source.choice(
        (
            source.invented(),
            f"{source.invented()}_{source.integer(1, 2030)}",
            source.word(words.NOUNS)[0],
            source.invented() + "-" + source.invented(),
        )
    )
    return same(
        stem + source.choice((".txt", ".csv", ".json", ".py", ".pdf", ".png", ".docx", ".xlsx", ".mp3", ".zip"))
    )


def snippet(source: Source, language: Language) -> Value:
    """Something that looks like code."""
    one, two, number = source.invented(), source.invented(), source.integer(0, 99)
    forms = (
        f"{one}({two})",
        f"{one}.{two}[{number}]",
        f"{one} == {number}",
        f"SELECT * FROM {one} WHERE {two} = {number}",
        f"{one}::{two}",
        f"--{one}={number}",
        f"{one} && {two}",
        f"{one}|{two}",
        f"x**2 + {number}*x",
        f"^{one}.*{two}$",
        f"${one}",
        f"print({number})",
        f"SELECT {one} FROM {two}",
        f"git {one} -m {two}",
    )
    return same(source.choice(forms), spaced=True)


def formula(source: Source, language: Language) -> Value:
    """A sum to be passed on as text."""
    text = str(source.integer(0, 999))
    for _ in range(source.integer(1, 3)):
        text += source.choice("+-*/") + str(source.integer(1, 999))
    return same(
        source.choice(
            (
                text,
                f"({text})*{source.integer(2, 9)}",
                f"sqrt({source.integer(1, 999)})",
                f"{source.integer(1, 20)}^{source.integer(2, 5)}",
            )
        )
    )


def title(source: Source, language: Language) -> Value:
    """The name of a thing: one to four words, most of them random."""
    if language == "zh" and source.chance(0.85):
        pair = source.word(words.ADJECTIVES)[1] + source.word(words.NOUNS)[1]
        return same(
            source.choice(
                (
                    pair,
                    hanzi(source, 2, 6),
                    source.word(words.NOUNS)[1] + hanzi(source, 1, 3),
                    hanzi(source, 2, 3) + source.word(words.NOUNS)[1],
                )
            )
        )
    parts = [
        source.choice((source.invented(), source.word(words.NOUNS)[0], source.word(words.ADJECTIVES)[0]))
        for _ in range(source.integer(1, 4))
    ]
    text = " ".join(parts)
    return same(source.choice((text, text.title(), text.capitalize())))


SENTENCES = by_language("sentences")


_SENTENCE_WORDS = (words.NOUNS, words.NOUNS, words.VERBS, words.ADJECTIVES)


def sentence(source: Source, language: Language) -> Value:
    """Free text such as the body of a message."""
    tongue = "zh" if language == "zh" and source.chance(0.9) else "en"
    noun, other, verb, adjective = (in_language(source.word(words_of), tongue) for words_of in _SENTENCE_WORDS)
    text = source.choice(SENTENCES[tongue]).format(
        noun=noun,
        other=other,
        verb=verb,
        adjective=adjective,
        name=person(source, tongue).text,
        number=source.integer(2, 99),
        clock=time(source, tongue).text,
        word=source.invented() if tongue == "en" else hanzi(source, 4, 9),
        word2=source.invented(),
        code=code(source, tongue).text,
    )
    return same(text.lower() if tongue == "en" and source.chance(0.3) else text, spaced=True)


RARE_SYMBOLS = "😀🚀🌟🍉🦊♥★→€£°αβγΩéüñçøåжшяд한글ひらカナ"


def symbol(source: Source, language: Language) -> Value:
    """Text with characters that the tokenizer spells in bytes, or quotes that JSON escapes."""
    word = invented(source, language).text
    return same(
        source.choice(
            (
                word + source.choice(RARE_SYMBOLS),
                source.string(RARE_SYMBOLS, 2, 4),
                f"{source.choice(RARE_SYMBOLS)} {word}",
                f"{word}\\{source.invented()}",
            )
        ),
        spaced=True,
    )
