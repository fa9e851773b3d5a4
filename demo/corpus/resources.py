"""Reads the corpus' text files: sections headed [name], whose lines are phrases or comma-separated words.

`words.txt` holds word lists, `phrases.txt` sentences with slots, `stories.txt` the plots, and `lexicon.txt` and
`hanzi.txt` words and characters without meaning; what the sections are for is known where they are used.
"""

from functools import cache
from pathlib import Path

Language = str  # "en" or "zh"
Pair = tuple[str, ...]  # (English, Chinese)
LANGUAGES: tuple[Language, ...] = ("en", "zh")


@cache
def _sections(file: str) -> dict[str, tuple[str, ...]]:
    sections: dict[str, list[str]] = {}
    name = ""
    for line in _text(file).splitlines():
        if line.startswith("[") and line.endswith("]"):
            name = line[1:-1]
            sections[name] = []
        elif line and not line.startswith("#"):
            sections[name].append(line)
    return {name: tuple(lines) for name, lines in sections.items()}


def phrases(section: str) -> tuple[str, ...]:
    """Return the lines of a section of phrases.txt."""
    return _sections("phrases.txt")[section]


def numbered_phrases(section: str) -> tuple[tuple[str, ...], ...]:
    """Return the lines of `section 1`, `section 2` and so on."""
    return tuple(lines for name, lines in _sections("phrases.txt").items() if name.startswith(f"{section} "))


def by_language(section: str) -> dict[Language, tuple[str, ...]]:
    """Return the phrases of `section en` and `section zh`."""
    return {language: phrases(f"{section} {language}") for language in LANGUAGES}


def plot(section: str) -> tuple[tuple[str, ...], ...]:
    """Return a section of stories.txt: for each line of the story its wordings."""
    return tuple(tuple(line.split(" | ")) for line in _sections("stories.txt")[section])


def word_list(section: str) -> tuple[str, ...]:
    """Return the words of a section of words.txt."""
    return tuple(word.strip() for line in _sections("words.txt")[section] for word in line.rstrip(",").split(","))


def entries(section: str) -> tuple[Pair, ...]:
    """Return the entries of a section of words.txt whose parts are joined by =."""
    return tuple(tuple(word.split("=")) for word in word_list(section))


def pairs(section: str) -> tuple[tuple[str, str], ...]:
    """Return the (English, Chinese) pairs of a section of words.txt."""
    return tuple((english, chinese) for english, chinese in entries(section))


@cache
def lexicon() -> tuple[str, ...]:
    """Return common English words, raw material for names."""
    return tuple(dict.fromkeys(_text("lexicon.txt").split()))


@cache
def common_hanzi() -> str:
    """Return common Chinese characters."""
    return "".join(dict.fromkeys("".join(_text("hanzi.txt").split())))


def _text(file: str) -> str:
    return (Path(__file__).parent / file).read_text(encoding="utf-8")
