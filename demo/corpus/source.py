"""Where every random choice of the corpus comes from: one seeded generator that knows which words it may use.

Words, invented names and function names are split by a hash of their own text, so no list says what is held out and
nothing can be in both halves: one word in eight belongs to the held-out data, and only to it.
"""

import random
import string
import zlib
from collections.abc import Sequence
from enum import Enum
from functools import cache
from typing import TypeVar

from .resources import Language, Pair, lexicon, word_list

T = TypeVar("T")

__all__ = ["Language", "Pair", "Source", "Split", "split_of"]

HELD_OUT_SHARE = 8  # one in so many


class Split(Enum):
    """Which half of the language a source speaks."""

    TRAIN = "train"
    HELD_OUT = "held_out"


def split_of(word: str) -> Split:
    """Return the only half in which `word` may appear as a name or an invented value."""
    return Split.HELD_OUT if zlib.crc32(word.lower().encode()) % HELD_OUT_SHARE == 0 else Split.TRAIN


@cache
def _allowed(words: tuple[T, ...], split: Split) -> tuple[T, ...]:
    return tuple(word for word in words if split_of(_english(word)) is split)


def _english(word: object) -> str:
    return word[0] if isinstance(word, tuple) else str(word)


ONSETS = word_list("onsets")
VOWELS = word_list("vowels")
CODAS = ("", "", "", "", *word_list("codas"))


class Source:
    """A random generator with the vocabulary of one split. Not thread safe; one per process and seed."""

    def __init__(self, seed: int, split: Split) -> None:
        self.random = random.Random(seed)
        self.split = split

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def choice(self, options: Sequence[T]) -> T:
        """Pick a phrasing: both splits speak with the same phrases."""
        return options[int(self.random.random() * len(options))]

    def word(self, words: tuple[T, ...]) -> T:
        """Pick a word or pair that this split may use."""
        allowed: tuple[T, ...] = _allowed(words, self.split)
        return self.choice(allowed)

    def words(self, words: tuple[T, ...], count: int) -> list[T]:
        allowed = _allowed(words, self.split)
        return self.random.sample(allowed, min(count, len(allowed)))

    def integer(self, low: int, high: int) -> int:
        return low + int(self.random.random() * (high - low + 1))

    def string(self, alphabet: str, low: int, high: int) -> str:
        return "".join(self.random.choices(alphabet, k=self.integer(low, high)))

    def lexeme(self) -> str:
        """Return an English word of this split."""
        return self.word(lexicon())

    def invented(self) -> str:
        """Return a lower-case name of this split: a word out of context, or one that nobody uses.

        The kinds differ in how they are cut into tokens, so that no token is known only from its usual places.
        """
        while True:
            word = self._invented()
            if len(word) > 2 and self.owns(word):
                return word

    def _invented(self) -> str:
        kind = self.random.random()
        if kind < 0.3:
            return self.lexeme()
        if kind < 0.6:
            syllables = self.random.choices((1, 2, 3, 4), weights=(2, 5, 3, 1))[0]
            return "".join(self.choice(ONSETS) + self.choice(VOWELS) for _ in range(syllables)) + self.choice(CODAS)
        if kind < 0.9:
            return "".join(self._fragment() for _ in range(self.choice((1, 2, 2, 3))))
        return self.string(string.ascii_lowercase, 3, 8)

    def _fragment(self) -> str:
        word = self.choice(lexicon())
        begin = self.integer(0, max(0, len(word) - 3))
        return word[begin : begin + self.integer(2, 6)]

    def owns(self, word: str) -> bool:
        return split_of(word) is self.split
