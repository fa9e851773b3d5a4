"""From rows of logits to tokens: every field of SamplingParams, on the device, batched, and row by row independent.

A row's token depends on its own logits, parameters, seed and output position only: not on its neighbours, not on which
step it is. The random number of a draw is a hash of (seed, position) made on the host. Where parameters leave several
equal choices at a cut (top_k, top_p), all of the equal ones stay.
"""

from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .api import SamplingParams, TokenLogprob
from .sequence import Sequence, has_penalties

_MASK_64 = 2**64 - 1
_GOLDEN_RATIO_64 = 0x9E3779B97F4A7C15
_SMALLEST_TEMPERATURE = torch.finfo(torch.float32).tiny  # below it a division could give 0 / 0
# How far a nucleus is looked for before everything is sorted. One row of 92544 logits on one core: 0.3 ms for the top
# 64, 9 ms for a sort; a nucleus of more than 256 tokens is rare.
NUCLEUS_HEAD = 256

# Why a row gave no token.
NOT_FINITE = (
    "the model produced numbers that are not finite (NaN or infinity) for this request; "
    "its weights or its compute type are at fault: try --dtype bfloat16 or float32"
)
NO_CHOICE = "logit_bias, min_tokens or the output's format leaves no token to choose; allow at least one"


class SampleRow(NamedTuple):
    """Whose token a row of logits gives, and which token of its output, counted from 0."""

    sequence: Sequence
    output_position: int

    @property
    def sampling(self) -> SamplingParams:
        """The request's parameters."""
        return self.sequence.sampling

    @property
    def is_stop_banned(self) -> bool:
        """Whether min_tokens forbids this token to end the sequence."""
        return self.sequence.is_stop_banned_at(self.output_position)

    @property
    def mask(self) -> bytes | bytearray | None:
        """The tokens that the sequence's constraint allows, a bit each; None: all."""
        constraint = self.sequence.constraint
        return None if constraint is None else constraint.mask_at(self.output_position)


class Sample(NamedTuple):
    """One row's token. `failure` says why there is none."""

    token_id: int
    logprob: TokenLogprob | None
    failure: str | None


@dataclass(slots=True)
class PenaltyState:
    """Which tokens a sequence has seen, kept on the device between steps so that each step adds only what is new."""

    in_context: torch.Tensor  # bool [vocab_size]: prompt and output, for repetition_penalty
    output_counts: torch.Tensor  # float32 [vocab_size]: output only, for presence and frequency penalty
    num_seen_tokens: int = 0


def uniform(seed: int, position: int) -> float:
    """Return a number in [0, 1) that only depends on its arguments: two rounds of SplitMix64 (Steele et al., 2014)."""
    bits = _split_mix(seed_hash(seed) + position)
    return (bits >> 11) * 2.0**-53


def seed_hash(seed: int) -> int:
    """Return the first of `uniform`'s two rounds, which is the same for all tokens of a sequence: 64 bits, unsigned."""
    return _split_mix(seed & _MASK_64)


def sample(logits: torch.Tensor, sequences: SequenceOf[Sequence]) -> list[Sample]:
    """Choose the next token of each sequence from its row of `logits`, fp32 [num_sequences, vocab_size]."""
    return sample_rows(logits, [SampleRow(sequence, sequence.num_output_tokens) for sequence in sequences])


def sample_rows(logits: torch.Tensor, rows: SequenceOf[SampleRow]) -> list[Sample]:
    """Choose a token from each row of `logits`, fp32 [num_rows, vocab_size]; a sequence may have several rows.

    Penalties count the tokens that the sequence has now, which is right for its next token only. A row without a finite
    best logit fails alone. Order of operations: see SamplingParams.
    """
    if not rows:
        return []
    peaks = logits.max(dim=-1)
    token_ids, is_valid = peaks.indices, peaks.values.isfinite()
    indices = [index for index, row in enumerate(rows) if not _is_plain_greedy(row)]
    if indices:
        row_ids = torch.tensor(indices, device=logits.device)
        chosen = [rows[index] for index in indices]
        adjusted = _adjusted(logits, row_ids, chosen)
        token_ids[row_ids], has_choice = _choose(adjusted, chosen)
        is_valid[row_ids] &= has_choice
    logprobs = _sampled_logprobs(logits, token_ids, rows)
    ids, valid = torch.stack((token_ids, is_valid.long())).tolist()
    return [
        Sample(token_id, logprobs.get(index), None if ok else _failure(logits[index]))
        for index, (token_id, ok) in enumerate(zip(ids, valid, strict=True))
    ]


def token_logprobs(logits: torch.Tensor, token_ids: SequenceOf[int], num_top: int) -> list[TokenLogprob]:
    """Return the logprob of each row's token and of its `num_top` most likely ones, from logits as the model gave them.

    `logits` is fp32 [num_tokens, vocab_size].
    """
    return _logprobs(logits, torch.tensor(token_ids, device=logits.device), [num_top] * len(token_ids))


def _split_mix(state: int) -> int:
    mixed = (state + _GOLDEN_RATIO_64) & _MASK_64
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return mixed ^ (mixed >> 31)


def _is_plain_greedy(row: SampleRow) -> bool:
    sampling = row.sampling
    return (
        sampling.temperature == 0.0
        and not sampling.logit_bias
        and not has_penalties(sampling)
        and not row.is_stop_banned
        and row.mask is None
    )


def _failure(logits: torch.Tensor) -> str:
    return NO_CHOICE if logits.max().isfinite() else NOT_FINITE


def _adjusted(logits: torch.Tensor, row_ids: torch.Tensor, rows: SequenceOf[SampleRow]) -> torch.Tensor:
    """Return a copy of these rows with logit_bias, penalties, the ban of stop tokens and masks applied."""
    adjusted = logits[row_ids]
    _add_logit_bias(adjusted, [row.sampling.logit_bias for row in rows])
    _apply_penalties(adjusted, [row.sequence for row in rows])
    _ban_stop_tokens(adjusted, rows)
    _apply_masks(adjusted, [row.mask for row in rows])
    return adjusted


def _add_logit_bias(logits: torch.Tensor, biases: SequenceOf[Mapping[int, float]]) -> None:
    entries = [(row, token_id, value) for row, bias in enumerate(biases) for token_id, value in bias.items()]
    if entries:
        rows, token_ids, values = zip(*entries, strict=True)
        where = torch.tensor((rows, token_ids), device=logits.device)
        logits[where[0], where[1]] += torch.tensor(values, dtype=logits.dtype, device=logits.device)


def _ban_stop_tokens(logits: torch.Tensor, rows: SequenceOf[SampleRow]) -> None:
    entries = [
        (index, token_id)
        for index, row in enumerate(rows)
        if row.is_stop_banned
        for token_id in row.sequence.stop_token_ids
    ]
    if entries:
        where = torch.tensor(entries, device=logits.device)
        logits[where[:, 0], where[:, 1]] = -torch.inf


def _apply_masks(logits: torch.Tensor, masks: SequenceOf[bytes | bytearray | None]) -> None:
    """Ban what the constraints do not allow; tokens beyond a mask's end are not allowed either."""
    rows = [row for row, mask in enumerate(masks) if mask is not None]
    if not rows:
        return
    packed = torch.frombuffer(bytearray().join(mask for mask in masks if mask is not None), dtype=torch.uint8)
    shifts = torch.arange(8, dtype=torch.uint8)
    is_allowed = (packed.view(len(rows), -1, 1) >> shifts & 1).view(len(rows), -1).bool().to(logits.device)
    row_ids = torch.tensor(rows, device=logits.device)
    masked = torch.full_like(logits[row_ids], -torch.inf)
    width = min(logits.shape[-1], is_allowed.shape[-1])
    masked[:, :width] = torch.where(is_allowed[:, :width], logits[row_ids, :width], -torch.inf)
    logits[row_ids] = masked


def _apply_penalties(logits: torch.Tensor, sequences: SequenceOf[Sequence]) -> None:
    """Repetition penalty (Keskar et al., 2019: positive logits are divided, negative multiplied), then OpenAI's two."""
    rows = [row for row, sequence in enumerate(sequences) if has_penalties(sequence.sampling)]
    if not rows:
        return
    samplings = [sequences[row].sampling for row in rows]
    states = [_penalty_state(sequences[row], logits) for row in rows]
    counts = torch.stack([state.output_counts for state in states])  # [num_rows, vocab_size]
    in_context = torch.stack([state.in_context for state in states])
    repetition = _column([sampling.repetition_penalty for sampling in samplings], logits)
    presence = _column([sampling.presence_penalty for sampling in samplings], logits)
    frequency = _column([sampling.frequency_penalty for sampling in samplings], logits)
    row_ids = torch.tensor(rows, device=logits.device)
    penalized = logits[row_ids]
    repeated = torch.where(penalized > 0, penalized / repetition, penalized * repetition)
    penalized = torch.where(in_context, repeated, penalized)
    logits[row_ids] = penalized - counts * frequency - (counts > 0) * presence


def _penalty_state(sequence: Sequence, like: torch.Tensor) -> PenaltyState:
    """Return the sequence's state with every token it has now; preemption does not change tokens, so it stays valid."""
    state = sequence.sampler_state
    if not isinstance(state, PenaltyState):
        vocab_size = like.shape[-1]
        state = PenaltyState(
            in_context=torch.zeros(vocab_size, dtype=torch.bool, device=like.device),
            output_counts=torch.zeros(vocab_size, device=like.device),
        )
        sequence.sampler_state = state
    if state.num_seen_tokens < sequence.num_tokens:
        new_ids = torch.tensor(sequence.token_ids[state.num_seen_tokens :], device=like.device)
        state.in_context[new_ids] = True
        new_output_ids = new_ids[max(0, sequence.num_prompt_tokens - state.num_seen_tokens) :]
        state.output_counts.index_add_(0, new_output_ids, torch.ones_like(new_output_ids, dtype=torch.float32))
        state.num_seen_tokens = sequence.num_tokens
    return state


def _choose(logits: torch.Tensor, rows: SequenceOf[SampleRow]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the token of each adjusted row, int64 [num_rows], and whether there was one to choose, bool [num_rows]."""
    peaks = logits.max(dim=-1)
    token_ids = peaks.indices
    indices = [index for index, row in enumerate(rows) if row.sampling.temperature > 0.0]
    if len(indices) == len(rows):
        token_ids = _draw(logits, peaks.values, rows)
    elif indices:
        row_ids = torch.tensor(indices, device=logits.device)
        token_ids[row_ids] = _draw(logits[row_ids], peaks.values[row_ids], [rows[index] for index in indices])
    return token_ids, peaks.values.isfinite()


def _draw(logits: torch.Tensor, peaks: torch.Tensor, rows: SequenceOf[SampleRow]) -> torch.Tensor:
    """Draw one token a row: the smallest id whose cumulative weight (fp64) exceeds u times the row's total."""
    samplings = [row.sampling for row in rows]
    temperature = _column([max(sampling.temperature, _SMALLEST_TEMPERATURE) for sampling in samplings], logits)
    weights = (logits - peaks[:, None]).div_(temperature).exp_()  # [num_rows, vocab_size], the best is exactly 1
    if any(sampling.top_k or sampling.top_p < 1.0 or sampling.min_p for sampling in samplings):
        weights.masked_fill_(weights < _thresholds(weights, samplings), 0.0)
    cumulative = weights.cumsum(dim=-1, dtype=torch.float64)
    u = _column([uniform(row.sequence.seed, row.output_position) for row in rows], logits, dtype=torch.float64)
    token_ids = torch.searchsorted(cumulative, u * cumulative[:, -1:], right=True).squeeze(-1)
    return token_ids.clamp_(max=logits.shape[-1] - 1)  # only a row of NaN comes that far, and it fails anyway


def _thresholds(weights: torch.Tensor, samplings: SequenceOf[SamplingParams]) -> torch.Tensor:
    """Return the smallest weight each row keeps, [num_rows, 1]: the strictest of top_k, top_p and min_p.

    All three keep the heaviest tokens, so each is a threshold; min_p is one as it stands, the best weight being 1.
    """
    thresholds = _column([sampling.min_p for sampling in samplings], weights)
    vocab_size = weights.shape[-1]
    rows = [row for row, s in enumerate(samplings) if 0 < s.top_k < vocab_size or s.top_p < 1.0]
    if rows:
        row_ids = torch.tensor(rows, device=weights.device)
        limited = _nucleus_thresholds(weights[row_ids], [samplings[row] for row in rows])
        thresholds[row_ids] = torch.maximum(thresholds[row_ids], limited)
    return thresholds


def _nucleus_thresholds(weights: torch.Tensor, samplings: SequenceOf[SamplingParams]) -> torch.Tensor:
    """Return the weight of the last token that top_k, then top_p keep, [num_rows, 1]."""
    vocab_size = weights.shape[-1]
    top_k = [s.top_k if 0 < s.top_k < vocab_size else None for s in samplings]
    num_head = min(vocab_size, max(NUCLEUS_HEAD, *(k or 0 for k in top_k)))
    head = weights.topk(num_head, dim=-1).values  # equal weights are interchangeable: only values are used
    last = torch.tensor([(k or 1) - 1 for k in top_k], device=weights.device)[:, None]
    is_limited = torch.tensor([k is not None for k in top_k], device=weights.device)[:, None]
    thresholds = torch.where(is_limited, head.gather(-1, last), 0.0)
    if all(s.top_p == 1.0 for s in samplings):
        return thresholds
    kept = weights if all(k is None for k in top_k) else torch.where(weights < thresholds, 0.0, weights)
    shares = _column([s.top_p if s.top_p < 1.0 else 0.0 for s in samplings], weights, dtype=torch.float64)
    wanted = shares * kept.sum(dim=-1, keepdim=True, dtype=torch.float64)
    is_nucleus = torch.tensor([s.top_p < 1.0 for s in samplings], device=weights.device)[:, None]
    return torch.where(is_nucleus, torch.maximum(thresholds, _mass_thresholds(weights, head, wanted)), thresholds)


def _mass_thresholds(weights: torch.Tensor, head: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Return the weight at which the heaviest weights of a row, summed up, reach `wanted`, [num_rows, 1].

    `head` is the beginning of the sorted row; rows whose head is too light are sorted to the end.
    """
    reached = head.cumsum(dim=-1, dtype=torch.float64)
    last = torch.searchsorted(reached, wanted).clamp_(max=head.shape[-1] - 1)
    thresholds = head.gather(-1, last)
    if head.shape[-1] < weights.shape[-1]:
        light = (reached[:, -1:] < wanted).squeeze(-1).nonzero().squeeze(-1)
        if light.numel():
            in_order = weights[light].sort(dim=-1, descending=True).values
            thresholds[light] = _mass_thresholds(weights[light], in_order, wanted[light])
    return thresholds


def _sampled_logprobs(
    logits: torch.Tensor, token_ids: torch.Tensor, rows: SequenceOf[SampleRow]
) -> dict[int, TokenLogprob]:
    """Return row -> logprob for the rows whose request asked for one."""
    asked = {index: n for index, row in enumerate(rows) if (n := row.sampling.num_logprobs) is not None}
    if not asked:
        return {}
    row_ids = torch.tensor(list(asked), device=logits.device)
    return dict(zip(asked, _logprobs(logits[row_ids], token_ids[row_ids], list(asked.values())), strict=True))


def _logprobs(logits: torch.Tensor, token_ids: torch.Tensor, num_top: list[int]) -> list[TokenLogprob]:
    logprobs = logits.log_softmax(dim=-1)
    chosen: list[float] = logprobs.gather(-1, token_ids[:, None]).squeeze(-1).tolist()
    top = logprobs.topk(max(num_top, default=0), dim=-1)
    rows = zip(token_ids.tolist(), chosen, top.indices.tolist(), top.values.tolist(), num_top, strict=True)
    return [
        TokenLogprob(token_id, logprob, tuple(zip(ids[:count], values[:count], strict=True)))
        for token_id, logprob, ids, values, count in rows
    ]


def _column(values: list[float], like: torch.Tensor, *, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, device=like.device)[:, None]
