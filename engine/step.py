"""What one step is: the records that travel between the scheduler, the loop and the runner.

A step is a list of chunks, at most one a sequence. The scheduler makes chunks, a runner turns each into a result, the
scheduler books the results. Steps are computed in the order they are launched in, and a runner may have several in
flight: a chunk then builds on tokens that nobody has read back from the device yet.
"""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from .api import TokenLogprob
from .sequence import Sequence

MAX_PROMPT_LOGPROB_ROWS = 256  # per step; a row is vocab_size floats, 256 of InternLM2's are 95 MB


class Chunk(NamedTuple):
    """The next tokens of one sequence to compute: the places `start` up to `end` of its history.

    The last `draft_token_ids` of them are guesses, the others are known to the host, with one exception: when `start`
    is the number of tokens that the host knows, the chunk's first token is the one that a step in flight samples for
    this sequence, and the runner finds it on the device.
    """

    sequence: Sequence
    start: int
    num_new_tokens: int  # drafts included
    is_sampled: bool  # a token follows: the chunk reaches the end of what is known
    draft_token_ids: tuple[int, ...] = ()
    is_run: bool = False  # all of its tokens are of the output and known: few enough to be computed as decode rows

    @property
    def end(self) -> int:
        """How many tokens of the sequence are in the KV cache once the step is over."""
        return self.start + self.num_new_tokens

    @property
    def num_sampled_rows(self) -> int:
        """How many of its last rows are sampled: the last token's and every draft's, or none."""
        return 1 + len(self.draft_token_ids) if self.is_sampled else 0

    @property
    def output_position(self) -> int:
        """Which token of the output, counted from 0, its first sampled row gives; each later row gives the next one."""
        return self.end - len(self.draft_token_ids) - self.sequence.num_prompt_tokens

    @property
    def num_prompt_logprobs(self) -> int:
        """How many of its first rows predict a prompt token whose logprob is wanted."""
        if not self.sequence.wants_prompt_logprobs:
            return 0
        return max(0, min(self.num_new_tokens, self.sequence.num_prompt_tokens - 1 - self.start))


class ChunkResult(NamedTuple):
    """What a step found for one chunk; `failure` says why the sequence cannot go on, `spares_cache` that what was
    computed of it is right all the same, `is_requests_fault` that another request than this would not fail.

    `token_ids` is empty unless the chunk is sampled. It holds the drafts that came out as sampled too, then the token
    sampled after the last of them; `logprobs` is parallel to it where the request asked for them, else empty. Of a
    constrained sequence, the tokens follow that its constraint forces, and what was sampled is missing where it was
    forced, and thus known, already, or where it was sampled without its mask. `is_over`: the last token ends it.
    """

    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    failure: str | None = None
    spares_cache: bool = False
    is_requests_fault: bool = False
    is_over: bool = False


@dataclass(slots=True)
class StepBudget:
    """What a step may still compute beside the decoding sequences."""

    num_prefill_tokens: int
    num_extra_rows: int  # decode rows beyond one for each live sequence, waiting ones included, as they may join
    num_prompt_logprob_rows: int = MAX_PROMPT_LOGPROB_ROWS

    def allowed_for(self, sequence: Sequence) -> int:
        """Return how many tokens of this sequence may be computed at most."""
        if sequence.wants_prompt_logprobs:
            return min(self.num_prefill_tokens, self.num_prompt_logprob_rows)
        return self.num_prefill_tokens

    def spend(self, chunk: Chunk) -> None:
        """Book a chunk that `allowed_for` allowed."""
        self.num_prefill_tokens -= chunk.num_new_tokens
        if chunk.sequence.wants_prompt_logprobs:
            self.num_prompt_logprob_rows -= chunk.num_new_tokens


class StepRunner(Protocol):
    """A model on a device, as the loop sees it. All methods are called on the engine thread."""

    device_busy_s: float  # in steps, since start; 0 where nobody measures it
    device_idle_s: float  # between the end of a step and the begin of one that was launched before that end

    @property
    def max_in_flight(self) -> int:
        """How many steps may be launched and not collected: 1 computes and waits in turn, 2 keep a device busy."""

    def launch(self, chunks: SequenceOf[Chunk]) -> Any:
        """Begin a step's forward pass after the steps in flight, without waiting for it, and return a handle."""

    def sample(self, step: Any) -> None:
        """Have the tokens of the step launched last chosen, under the masks that its constraints have now."""

    def collect(self, step: Any) -> list[ChunkResult]:
        """Wait for the oldest step in flight, which was sampled, and return one result a chunk, in order."""

    def probe(self) -> None:
        """Compute one token that is nobody's; raise what the device raises when it cannot compute any more."""
