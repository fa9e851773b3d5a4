"""One request inside the engine: its tokens, how far they are computed, which blocks hold them.

Owns the record and the checks a request passes to become one. Status and progress are changed by `scheduler.py` alone.
"""

import math
import secrets
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

from .api import (
    ContextTooLongError,
    EngineInfo,
    FinishReason,
    InvalidRequestError,
    Request,
    SamplingParams,
    TokenConstraint,
    TokenLogprob,
)
from .constraints import ConstraintState


class SequenceStatus(Enum):
    """Where a sequence is in its life. Preemption leads from RUNNING back to WAITING."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False, kw_only=True)
class Sequence:
    """The state of one live request; two of them are never equal."""

    uid: str
    sampling: SamplingParams
    token_ids: "array[int]"  # "q": prompt, then output
    num_prompt_tokens: int
    max_new_tokens: int  # the request's max_tokens, clipped to the context
    stop_token_ids: frozenset[int]  # every token that ends it
    seed: int
    rope_base: float  # fixed by the prompt's length, so that preemption does not change it
    num_prompt_logprobs: int | None
    is_deterministic: bool = False  # its tokens may not depend on what else is computed beside them

    status: SequenceStatus = SequenceStatus.WAITING
    finish_reason: FinishReason | None = None
    block_ids: "array[int]" = field(default_factory=lambda: array("q"))
    block_hashes: list[bytes] = field(default_factory=list)  # of the full blocks of token_ids, as far as needed so far
    num_computed_tokens: int = 0  # tokens whose K and V are in the blocks, as far as finished steps go
    num_launched_tokens: int = 0  # as num_computed_tokens, once the steps in flight are over
    num_steps_in_flight: int = 0  # launched, with a chunk of it; until they are over its blocks and slot stay its own
    slot: int = field(init=False, repr=False)  # its row in tables by sequence; set, and its own, while it holds blocks
    num_published_blocks: int = 0
    num_cached_tokens: int | None = None  # prompt tokens the prefix cache spared; None before the first admission
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    constraint: ConstraintState | None = None  # what its tokens have to obey
    guess_record: object = None  # what `speculation.py` keeps between steps
    sampler_state: object = None  # what `sampler.py` keeps between steps; it goes when the sequence goes

    @property
    def num_tokens(self) -> int:
        """Prompt and output tokens so far."""
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_samples_in_flight(self) -> int:
        """Tokens that the steps in flight add to it at least: once its last token is launched, each launch adds one."""
        return max(0, self.num_launched_tokens + 1 - len(self.token_ids))

    @property
    def num_pending_tokens(self) -> int:
        """Tokens that no step was launched for, those in flight counted as known: 1 when decoding."""
        return len(self.token_ids) + self.num_samples_in_flight - self.num_launched_tokens

    @property
    def is_prompt_launched(self) -> bool:
        """Whether all that remains is of the output."""
        return self.num_launched_tokens >= self.num_prompt_tokens

    @property
    def awaits_constraint(self) -> bool:
        """Whether nothing can be done for it before its next mask or its forced tokens have come."""
        constraint = self.constraint
        if constraint is None:
            return False
        return constraint.is_late or (self.num_samples_in_flight > 0 and constraint.has_forced)

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether logprobs of prompt tokens are still to be computed; cached blocks cannot give them."""
        return self.num_prompt_logprobs is not None and len(self.prompt_logprobs) < self.num_prompt_tokens - 1

    def is_stop_banned_at(self, output_position: int) -> bool:
        """Whether min_tokens forbids the output's token at this position, counted from 0, to end the sequence.

        An output that its constraint lets not go on may end all the same.
        """
        if output_position >= self.sampling.min_tokens or not self.stop_token_ids:
            return False
        return self.constraint is None or not self.constraint.must_end


def new_sequence(
    request: Request, *, info: EngineInfo, rope_base_for: Callable[[int], float], is_deterministic: bool = False
) -> Sequence:
    """Check a request against the model's limits and return its sequence; raise InvalidRequestError otherwise.

    `rope_base_for` gives the RoPE base for a prompt of that many tokens; `is_deterministic` holds for every request.
    """
    token_ids = _checked_prompt(request, info.vocab_size)
    num_prompt_tokens = len(token_ids)
    sampling = request.sampling
    _check_sampling(sampling, info.vocab_size)
    _check_count("prompt_logprobs", request.num_prompt_logprobs, info.vocab_size)
    if num_prompt_tokens + min(1, sampling.max_tokens) > info.session_len:
        raise ContextTooLongError(num_prompt_tokens, info.session_len)
    return Sequence(
        uid=request.uid,
        sampling=sampling,
        token_ids=token_ids,
        num_prompt_tokens=num_prompt_tokens,
        max_new_tokens=min(sampling.max_tokens, info.session_len - num_prompt_tokens),
        stop_token_ids=sampling.stop_token_ids | (frozenset() if sampling.ignore_eos else info.eos_token_ids),
        seed=secrets.randbits(64) if sampling.seed is None else sampling.seed,
        rope_base=rope_base_for(num_prompt_tokens),
        num_prompt_logprobs=request.num_prompt_logprobs,
        is_deterministic=is_deterministic or request.deterministic,
        constraint=None if request.constraint is None else _constraint_state(request.constraint, sampling),
    )


def has_penalties(sampling: SamplingParams) -> bool:
    """Say whether tokens that were seen change the logits."""
    return sampling.repetition_penalty != 1.0 or sampling.presence_penalty != 0.0 or sampling.frequency_penalty != 0.0


def _constraint_state(constraint: TokenConstraint, sampling: SamplingParams) -> ConstraintState:
    """Decide when forced tokens go without a step: not where their logprobs are wanted, or the sampler counts them."""
    counts_tokens = has_penalties(sampling)
    is_plain = sampling.num_logprobs is None and not counts_tokens
    return ConstraintState(
        constraint,
        fast_forward_from=sampling.min_tokens if is_plain else None,
        may_be_late=not counts_tokens,
    )


def _checked_prompt(request: Request, vocab_size: int) -> "array[int]":
    try:
        token_ids = array("q", request.prompt_token_ids)
    except (TypeError, OverflowError) as error:
        raise InvalidRequestError(f"the prompt holds something that is not a token id: {error}", "prompt") from error
    if not token_ids:
        raise InvalidRequestError("the prompt is empty; at least one token is needed", "prompt")
    _check_token_ids("prompt", token_ids, vocab_size)
    return token_ids


def _check_token_ids(param: str, token_ids: "array[int] | frozenset[int]", vocab_size: int) -> None:
    for token_id in (min(token_ids), max(token_ids)) if token_ids else ():
        if not 0 <= token_id < vocab_size:
            raise InvalidRequestError(
                f"{param} holds the token id {token_id}; this model's ids are 0 to {vocab_size - 1}", param
            )


def _check_sampling(sampling: SamplingParams, vocab_size: int) -> None:
    _check_range("temperature", sampling.temperature, 0.0, math.inf)
    _check_range("top_p", sampling.top_p, 0.0, 1.0)
    _check_range("min_p", sampling.min_p, 0.0, 1.0)
    _check_range("presence_penalty", sampling.presence_penalty, -math.inf, math.inf)
    _check_range("frequency_penalty", sampling.frequency_penalty, -math.inf, math.inf)
    _check_range("repetition_penalty", sampling.repetition_penalty, 0.0, math.inf)
    if sampling.repetition_penalty == 0.0:
        raise InvalidRequestError("repetition_penalty is 0; it divides, so give a number above 0", "repetition_penalty")
    for bias in sampling.logit_bias.values():
        _check_range("logit_bias", bias, -math.inf, math.inf)
    _check_token_ids("logit_bias", frozenset(sampling.logit_bias), vocab_size)
    _check_token_ids("stop_token_ids", sampling.stop_token_ids, vocab_size)
    _check_count("top_k", sampling.top_k, None)
    _check_count("max_tokens", sampling.max_tokens, None)
    _check_count("min_tokens", sampling.min_tokens, None)
    _check_count("logprobs", sampling.num_logprobs, vocab_size)
    if sampling.min_tokens > sampling.max_tokens:
        raise InvalidRequestError(
            f"min_tokens is {sampling.min_tokens}, more than max_tokens, {sampling.max_tokens}; lower min_tokens",
            "min_tokens",
        )


def _check_range(param: str, value: float, low: float, high: float) -> None:
    """Infinite bounds are open: the value has to be a finite number."""
    if not (math.isfinite(value) and low <= value <= high):
        wanted = f"from {low:g} to {high:g}" if math.isfinite(high) else f"of {low:g} or more"
        limit = wanted if math.isfinite(low) else "that is finite"
        raise InvalidRequestError(f"{param} is {value}; give a number {limit}", param)


def _check_count(param: str, value: int | None, high: int | None) -> None:
    if value is not None and (value < 0 or (high is not None and value > high)):
        limit = "0 or more" if high is None else f"from 0 to {high}"
        raise InvalidRequestError(f"{param} is {value}; give a whole number {limit}", param)
