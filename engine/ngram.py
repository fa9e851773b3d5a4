"""Prompt lookup: what followed the last time the same few tokens came (Saxena, "Prompt Lookup Decoding", 2023).

Owns the index of one sequence's tokens, which grows with them at a constant cost a token. Whether a guess pays is
`speculation.py`'s business.
"""

from array import array

MIN_MATCH = 2  # tokens that two places must have in common
MAX_MATCH = 5  # more in common does not make a place better
# Earlier places of the last two tokens that are compared, latest first. Text that repeats agrees within a few; the rest
# would cost 0.2 us each.
MAX_CANDIDATES = 8
_NOWHERE = -1
_SHIFT = 32  # a pair of token ids is one number; ids are below 2**31


class NgramIndex:
    """Where each pair of neighbouring tokens came last, and before that, in the tokens of one sequence."""

    def __init__(self, token_ids: "array[int]") -> None:
        """`token_ids` may grow at its end, and is never changed otherwise."""
        self._token_ids = token_ids
        self._last_place: dict[int, int] = {}  # of a pair's second token
        self._earlier_place = array("q")  # by place: where the pair that ends there came before

    @property
    def num_indexed(self) -> int:
        """Tokens that the index knows."""
        return len(self._earlier_place)

    def extend(self, num_tokens: int) -> None:
        """Take in the sequence's tokens up to so many."""
        token_ids, last_place, earlier_place = self._token_ids, self._last_place, self._earlier_place
        if not earlier_place:
            earlier_place.append(_NOWHERE)  # the first token ends no pair
        for place in range(len(earlier_place), num_tokens):
            pair = token_ids[place - 1] << _SHIFT | token_ids[place]
            earlier_place.append(last_place.get(pair, _NOWHERE))
            last_place[pair] = place

    def continuation(self, count: int) -> tuple[int, ...]:
        """Return the `count` tokens that followed the best earlier match of the last indexed ones; or none.

        The longest match is the best, and among equals the latest. What it is followed by may reach the end, where the
        text repeats itself: it goes on repeating.
        """
        match = self._best_match()
        if match == _NOWHERE:
            return ()
        token_ids, first = self._token_ids, match + 1
        period = self.num_indexed - first
        if period >= count:
            return tuple(token_ids[first : first + count])
        return tuple([token_ids[first + offset % period] for offset in range(count)])

    def _best_match(self) -> int:
        """Return the place of the match's last token."""
        token_ids = self._token_ids
        last = self.num_indexed - 1
        best, best_len = _NOWHERE, MIN_MATCH - 1
        place = self._earlier_place[last]
        for _ in range(MAX_CANDIDATES):
            if place == _NOWHERE:
                break
            length = MIN_MATCH
            while length < MAX_MATCH and length <= place and token_ids[place - length] == token_ids[last - length]:
                length += 1
            if length > best_len:
                best, best_len = place, length
                if length == MAX_MATCH:
                    break
            place = self._earlier_place[place]
        return best
