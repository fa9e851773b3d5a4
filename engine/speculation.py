"""Decoding several tokens in one step without a second model: guesses from the text itself, checked by the model.

The scheduler asks `NgramProposer` for guesses; a step computes them as further rows, samples each row at its own place
in the output, and keeps those that came out as guessed, and one more. As the token at a place depends on the tokens
before it, the request's seed and the place alone (sampler.py), the output is that of decoding without guesses.

Owns when guessing pays. That is found out without guessing: while it is off, each guess that would have been made is
compared with the tokens that come. It is on for a batch where the tokens this would save outweigh what steps with
guesses cost beside those without: their rows, and that the next one cannot be launched before their tokens are known.
Both kinds of steps are timed as they come; what guessing costs is believed less and less the longer it is off, so that
it is tried again.
"""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Protocol

from .ngram import NgramIndex
from .sequence import Sequence, has_penalties

# With more sequences a step's rows fill the device, or nearly: 4-bit products are as fast for 64 rows as for one.
MAX_SEQUENCES = 12
MIN_ACCEPTED = 0.5  # right guesses a step on average; a sequence with fewer makes none
ACCEPTED_WEIGHT = 0.15  # of the newest step in the average: a change of the text shows within some ten steps
TIME_WEIGHT = 0.1  # of the newest step in the average of its kind
MARGIN = 1.05  # how much faster it has to be
# What a step with guesses takes, relative to one without, until one was timed, and what is believed again after long.
ASSUMED_COST = 1.3
FORGETTING = 0.004  # of what was measured, at each step without guesses: half of it in 170 steps
LONGEST_COUNTED = 20.0  # plain steps
INDEXED_TOKENS_PER_STEP = 4096  # of a long prompt, about 2 ms on the event loop
MOST_TOKENS_COMPARED = 64  # more that come at once, after a time in a large batch, are indexed only


class Proposer(Protocol):
    """What the scheduler asks for guesses; it lives on the event loop."""

    def wants_to_draft(self, sequences: SequenceOf[Sequence]) -> bool:
        """Whether guesses pay in the next step, which decodes `sequences`."""

    def propose(self, sequence: Sequence) -> tuple[int, ...]:
        """Return what may come next in a sequence whose tokens are all known to the host."""

    def note_step(self, num_sequences: int, num_guessed: int, seconds: float) -> None:
        """Take down how long a step took that decoded so many sequences with so many guesses, and did nothing else."""


@dataclass(slots=True)
class GuessRecord:
    """One sequence's guesses, made or only thought of, and how many came true."""

    index: NgramIndex
    guess: tuple[int, ...] = ()
    num_right: int = 0  # tokens of the guess that have come
    num_seen_tokens: int = 0
    mean_accepted: float = 0.0  # tokens a step would have saved, or has


@dataclass(slots=True)
class StepTimes:
    """What steps of about one batch size take."""

    plain_s: float | None = None
    cost: float = ASSUMED_COST  # of a step with guesses, in plain ones

    def record(self, seconds: float, *, has_guesses: bool) -> None:
        """Count a step; one that took very much longer than usual did something else beside."""
        if self.plain_s is None:
            if not has_guesses:
                self.plain_s = seconds
            return
        seconds = min(seconds, LONGEST_COUNTED * self.plain_s)
        if has_guesses:
            self.cost += TIME_WEIGHT * (seconds / self.plain_s - self.cost)
        else:
            self.plain_s += TIME_WEIGHT * (seconds - self.plain_s)
            self.cost += FORGETTING * (ASSUMED_COST - self.cost)


def max_rows_with_drafts(num_draft_tokens: int) -> int:
    """Return how many rows a step with guesses has at most."""
    return MAX_SEQUENCES * (1 + num_draft_tokens)


@dataclass(slots=True)
class NgramProposer:
    """The Proposer that looks the text up in itself."""

    num_draft_tokens: int
    _times: dict[int, StepTimes] = field(default_factory=dict)  # by the bits of the number of sequences
    _known_rows: set[int] = field(default_factory=set)  # of steps with guesses

    def wants_to_draft(self, sequences: SequenceOf[Sequence]) -> bool:
        """Whether a step that decodes these sequences is worth more with guesses."""
        if len(sequences) > MAX_SEQUENCES:
            return False
        saved = 0.0
        for sequence in sequences:
            if _may_guess(sequence):
                record = self._observe(sequence)
                if record.mean_accepted >= MIN_ACCEPTED and record.guess:
                    saved += record.mean_accepted
        return saved > 0.0 and 1.0 + saved / len(sequences) > MARGIN * self._times_for(len(sequences)).cost

    def propose(self, sequence: Sequence) -> tuple[int, ...]:
        """Return guesses at what follows the sequence's tokens; none where it is not likely to be right."""
        if not _may_guess(sequence):
            return ()
        record = self._observe(sequence)
        if record.mean_accepted < MIN_ACCEPTED:
            return ()
        if record.num_right:  # a guess that was only thought of is coming true; this one begins here
            record.guess, record.num_right = record.index.continuation(self.num_draft_tokens), 0
        return record.guess

    def note_step(self, num_sequences: int, num_guessed: int, seconds: float) -> None:
        """Take down how long a step took; the first with so many rows may have prepared what others find ready."""
        if num_sequences > MAX_SEQUENCES:
            return
        num_rows = num_sequences + num_guessed
        if num_guessed and num_rows not in self._known_rows:
            self._known_rows.add(num_rows)
            return
        self._times_for(num_sequences).record(seconds, has_guesses=num_guessed > 0)

    def _times_for(self, num_sequences: int) -> StepTimes:
        return self._times.setdefault(num_sequences.bit_length(), StepTimes())

    def _observe(self, sequence: Sequence) -> GuessRecord:
        """Compare what has come with what was guessed, and guess anew where a guess is used up or was wrong."""
        record = sequence.guess_record
        if not isinstance(record, GuessRecord):
            record = sequence.guess_record = GuessRecord(NgramIndex(sequence.token_ids))
        num_known = len(sequence.token_ids)
        num_new = num_known - record.num_seen_tokens
        if num_new == 0:
            return record
        index = record.index
        if 0 < record.num_seen_tokens == index.num_indexed and num_new <= MOST_TOKENS_COMPARED:
            self._compare(record, sequence)
            return record
        index.extend(min(num_known, index.num_indexed + INDEXED_TOKENS_PER_STEP))
        if index.num_indexed == num_known:
            record.num_seen_tokens = num_known
            record.guess, record.num_right = index.continuation(self.num_draft_tokens), 0
        else:
            record.guess = ()
        return record

    def _compare(self, record: GuessRecord, sequence: Sequence) -> None:
        for place in range(record.num_seen_tokens, len(sequence.token_ids)):
            token_id = sequence.token_ids[place]
            record.index.extend(place + 1)
            if record.num_right < len(record.guess) and token_id == record.guess[record.num_right]:
                record.num_right += 1
                continue
            record.mean_accepted += ACCEPTED_WEIGHT * (record.num_right - record.mean_accepted)
            record.guess, record.num_right = record.index.continuation(self.num_draft_tokens), 0
        record.num_seen_tokens = len(sequence.token_ids)


def _may_guess(sequence: Sequence) -> bool:
    """Whether the tokens of a request are independent of how many a step brings; penalties count those before."""
    sampling = sequence.sampling
    return (
        not has_penalties(sampling)
        and not sampling.logit_bias
        and sequence.constraint is None
        and sequence.num_output_tokens >= sampling.min_tokens
    )
