"""Which tokens one reply may go on with: reasoning and free text stay free, the rest obeys a grammar, token by token.

Owns where in a reply a grammar begins. `ReplyRules` says so for all choices of a request, `ReplyConstraint` is one
choice on its way. The grammars themselves are `grammar.py`'s. Not thread-safe: one thread at a time drives a reply.
"""

import threading
from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from .grammar import Grammar, MaskMeter, Vocabulary

if TYPE_CHECKING:
    from llguidance import LLMatcher


class TokenSets:
    """Sets of tokens of one vocabulary as bit masks: bit i of the number, and of its bytes, is token i."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self.num_bytes = -(-len(vocabulary.token_bytes) // 32) * 4
        texts = [b"" if i in vocabulary.control_ids else data for i, data in enumerate(vocabulary.token_bytes)]
        self.all = (1 << len(texts)) - 1
        self.ends = bits_of(vocabulary.end_ids)
        self.spaced = bits_of([i for i, text in enumerate(texts) if text.startswith(b" ")])
        self.blank = bits_of([i for i, text in enumerate(texts) if text and not text.strip()])
        self.bracketed = bits_of([i for i, text in enumerate(texts) if text.lstrip()[:1] in (b"{", b"[")])


def bits_of(token_ids: Collection[int]) -> int:
    """Return the bit mask of some tokens."""
    mask = bytearray(max(token_ids, default=-1) // 8 + 1)
    for token_id in token_ids:
        mask[token_id // 8] |= 1 << token_id % 8
    return int.from_bytes(mask, "little")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplyRules:
    """What a request's replies have to be; at least one of the grammars is given.

    `answer` is what the reply is made of, from its first token behind reasoning on; None: free text. `calls` is what
    follows a token of `openers`, to the end of the reply. `calls_open_with_bracket`: so does, in place of free text, a
    reply that begins with a bracket, and so does what comes behind a token of `guards`. `think_ids` are the tokens
    around reasoning, `opens_in_reasoning` says that the prompt ends behind the first one.
    """

    sets: TokenSets
    answer: Grammar | None = None
    calls: Grammar | None = None
    openers: frozenset[int] = frozenset()
    calls_open_with_bracket: bool = False
    guards: frozenset[int] = frozenset()
    think_ids: tuple[int, int] | None = None
    opens_in_reasoning: bool = False
    drops_first_space: bool = False  # a reader does not see a space that the reply begins with

    @property
    def unenforced(self) -> tuple[str, ...]:
        """The schema keywords that the grammars leave out."""
        grammars = [grammar for grammar in (self.answer, self.calls) if grammar is not None]
        return tuple(sorted({keyword for grammar in grammars for keyword in grammar.unenforced}))

    def new_constraint(self) -> "ReplyConstraint":
        """Return the constraint of one reply."""
        return ReplyConstraint(self)


class _Stage(Enum):
    START = "before the answer"
    REASONING = "in the reasoning"
    FREE = "in free text"
    GRAMMAR = "in a grammar"
    OVER = "behind the reply's last token"


class ReplyConstraint:
    """One reply. Ask for the mask, sample, accept the token, and so on; what it raises is final."""

    def __init__(self, rules: ReplyRules) -> None:
        self._rules = rules
        self._stage = _Stage.REASONING if rules.opens_in_reasoning else _Stage.START
        self._may_think = rules.think_ids is not None and not rules.opens_in_reasoning
        self._may_be_blank = False  # one blank token between reasoning and answer, which a reader does not see
        self._grammar = rules.answer or rules.calls  # what its next mask is computed with
        self._own_lock = threading.Lock()
        self._matcher: LLMatcher | None = None
        self._known_mask: bytearray | None = None  # of the matcher as it is
        self._meter = MaskMeter(len(rules.sets.vocabulary.token_bytes))

    @property
    def lock(self) -> threading.Lock:
        """What to hold while anything below is called: replies that obey the same grammar share it."""
        if self._grammar is None or self._stage not in (_Stage.START, _Stage.GRAMMAR):
            return self._own_lock
        return self._grammar.lock

    @property
    def is_over(self) -> bool:
        """Whether the grammar that the reply obeys has ended; free text ends where others say so."""
        return self._stage is _Stage.OVER

    @property
    def must_end(self) -> bool:
        """Whether nothing may follow any more but the end."""
        return self._stage is _Stage.GRAMMAR and self._current_matcher().is_stopped()

    def mask(self) -> bytes | bytearray | None:
        """Return the tokens that may come next, a bit each, in words of 32; None: every token may.

        The next call may overwrite them.
        """
        if self._stage is _Stage.GRAMMAR:
            mask, self._known_mask = self._known_mask, None
            return self._meter.mask_of(self._current_matcher()) if mask is None else mask
        bits = self._allowed()
        return None if bits is None else bits.to_bytes(self._rules.sets.num_bytes, "little")

    def take_forced(self) -> list[int]:
        """Go on by the tokens of which the mask would allow no other, as far as they are known, and return them."""
        if self._stage is _Stage.START:
            return self._take_forced_at_start()
        if self._stage is not _Stage.GRAMMAR:
            return []
        matcher = self._current_matcher()
        if self._meter.was_long:
            self._known_mask = self._meter.mask_of(matcher)
        token_ids = self._meter.forced_by(matcher)
        if token_ids:
            self._known_mask = None
            if not matcher.consume_tokens(token_ids):
                raise RuntimeError(f"the grammar broke: {matcher.get_error()[:300]}")
        return token_ids

    def _take_forced_at_start(self) -> list[int]:
        """Enter the answer's grammar if nothing else may come and it leaves no choice."""
        rules = self._rules
        if rules.answer is None or rules.calls is not None or self._may_think or self._may_be_blank:
            return []
        token_ids = self._meter.forced_by(rules.answer.new_matcher())
        if not token_ids or (rules.drops_first_space and rules.sets.spaced >> token_ids[0] & 1):
            return []
        self._enter(rules.answer)
        return self.take_forced()

    def accept(self, token_id: int) -> None:
        """Go on by a token that the mask allowed."""
        rules = self._rules
        if self._stage is _Stage.GRAMMAR:
            self._accept_in_grammar(token_id)
        elif rules.calls is not None and token_id in rules.openers:
            self._enter(rules.calls)
        elif token_id in rules.guards:
            self._stage = _Stage.START
        elif self._stage is _Stage.REASONING:
            if rules.think_ids is not None and token_id == rules.think_ids[1]:
                self._stage, self._may_be_blank = _Stage.START, True
        elif self._stage is _Stage.START:
            self._accept_at_start(token_id)

    def _allowed(self) -> int | None:
        """Return what may come outside a grammar."""
        rules, sets = self._rules, self._rules.sets
        if self._stage is _Stage.REASONING:
            if rules.answer is None:
                return None
            barred = sets.ends if rules.calls is not None else sets.ends | bits_of(rules.openers)
            return sets.all & ~barred  # an answer has to follow, and an opener would end the reasoning
        if self._stage is not _Stage.START:
            return None
        if rules.answer is None:
            if not rules.calls_open_with_bracket or rules.calls is None:
                return None
            return sets.all & ~sets.bracketed | self._grammar_bits(rules.calls.new_matcher())
        bits = self._grammar_bits(rules.answer.new_matcher())
        if rules.drops_first_space:
            bits &= ~sets.spaced
        if self._may_be_blank:
            bits |= sets.blank
        if self._may_think and rules.think_ids is not None:
            bits |= 1 << rules.think_ids[0]
        return bits | (bits_of(rules.openers) if rules.calls is not None else 0)

    def _accept_at_start(self, token_id: int) -> None:
        rules, sets = self._rules, self._rules.sets
        is_blank = bool(sets.blank >> token_id & 1)
        if self._may_think and rules.think_ids is not None and token_id == rules.think_ids[0]:
            self._stage, self._may_think = _Stage.REASONING, False
        elif rules.answer is not None:
            if is_blank and self._may_be_blank:
                self._may_be_blank = False
                return
            self._enter(rules.answer)
            self._accept_in_grammar(token_id)
        elif rules.calls is not None and rules.calls_open_with_bracket and sets.bracketed >> token_id & 1:
            self._enter(rules.calls)
            self._accept_in_grammar(token_id)
        elif not is_blank and token_id not in sets.vocabulary.control_ids:
            self._stage = _Stage.FREE

    def _enter(self, grammar: Grammar) -> None:
        self._stage, self._grammar, self._matcher = _Stage.GRAMMAR, grammar, grammar.new_matcher()

    def _accept_in_grammar(self, token_id: int) -> None:
        matcher, self._known_mask = self._current_matcher(), None
        if not matcher.consume_token(token_id):
            raise RuntimeError(f"the grammar broke: {matcher.get_error()[:300]}")
        if token_id in self._rules.sets.vocabulary.end_ids:
            self._stage = _Stage.OVER

    def _current_matcher(self) -> "LLMatcher":
        assert self._matcher is not None
        return self._matcher

    def _grammar_bits(self, matcher: "LLMatcher") -> int:
        return int.from_bytes(self._meter.mask_of(matcher), "little") & self._rules.sets.all
