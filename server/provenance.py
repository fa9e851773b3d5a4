"""Keeps what users wrote apart from what a template wrote, through a template engine that knows only plain text.

Owns one trick: before rendering, a marker is put inside every spelling of a control token in user data, so that the
rendered text spells control tokens only where the template itself did; after the text was split at those, the markers
are taken out. Knows no messages and no templates.
"""

import json
import re
import secrets
from collections.abc import Collection
from typing import Any

_NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]  # never assigned: no text means anything by them
_MARKER_CHARS = 8  # 40 random bits: users cannot write what they cannot know


class ControlTokenShield:
    """Covers and uncovers user data for one set of control tokens."""

    def __init__(self, control_tokens: Collection[str]) -> None:
        spellings = sorted((text for text in control_tokens if len(text) > 1), key=len, reverse=True)
        self._marker = _random_marker()
        self.end_mark = _random_marker()  # to find the end of one string again in the rendered text
        self._escaped_marker = json.dumps(self._marker)[1:-1]  # as a template's ASCII-only JSON shows it
        self._spelling = re.compile("|".join(map(re.escape, spellings))) if spellings else None
        # Two fields may meet in the prompt, each with a part of a control token. A part of one character needs no
        # cover: the other part then has all the rest, and is covered.
        self._heads = {text[:length] for text in spellings for length in range(2, len(text))}
        self._tails = {text[-length:] for text in spellings for length in range(2, len(text))}
        self._longest_part = max(map(len, spellings), default=0) - 1

    def cover(self, value: Any, *, allowed: Collection[str] = ()) -> Any:
        """Return `value` (JSON data) with markers in every string and key; spellings in `allowed` stay as they are."""
        if isinstance(value, str):
            return self._cover_text(value, allowed)
        if isinstance(value, dict):
            return {self.cover(key, allowed=allowed): self.cover(item, allowed=allowed) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.cover(item, allowed=allowed) for item in value]
        return value

    def uncover(self, text: str) -> str:
        """Return a part of the rendered text as users wrote it."""
        return text.replace(self._marker, "").replace(self._escaped_marker, "")

    def _cover_text(self, text: str, allowed: Collection[str]) -> str:
        if self._spelling is None:
            return text
        cuts = []
        match = self._spelling.search(text)
        while match:
            if match[0] not in allowed:
                cuts.append(match.start() + 1)
            match = self._spelling.search(text, match.start() + 1)  # spellings may overlap
        part_lengths = range(2, min(self._longest_part, len(text)) + 1)
        if any(text[:length] in self._tails for length in part_lengths):
            cuts.insert(0, 1)
        if any(text[-length:] in self._heads for length in part_lengths):
            cuts.append(len(text) - 1)
        if not cuts:
            return text
        return self._marker.join(text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True))


def _random_marker() -> str:
    return "".join(secrets.choice(_NONCHARACTERS) for _ in range(_MARKER_CHARS))
