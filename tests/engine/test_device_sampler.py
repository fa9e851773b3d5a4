"""The device's sampler against the host's: the same logits, seeds and positions have to give the same tokens."""

import math
from collections.abc import Sequence as SequenceOf
from typing import Any

import pytest
import torch

from lmdserve.engine import sampler
from lmdserve.engine.api import EngineInfo, Request, SamplingParams
from lmdserve.engine.device_sampler import DeviceSampler, TokenMasks
from lmdserve.engine.sequence import Sequence, new_sequence
from lmdserve.engine.step import Chunk

VOCAB_SIZE = 1500
EOS = 3
NUM_SLOTS = 16
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

PLAIN: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {},
    {"temperature": 0.6},
    {"top_k": 40},
    {"top_p": 0.9},
    {"min_p": 0.05},
    {"top_p": 0.0},
    {"temperature": 1e-30},
    {"temperature": 1.5, "top_k": 50, "top_p": 0.8, "min_p": 0.01},
    {"temperature": 3.0, "top_p": 0.95},
]
EDITED: list[dict[str, Any]] = [
    {"temperature": 0.0, "repetition_penalty": 1.3},
    {"presence_penalty": 0.7, "frequency_penalty": 0.3, "top_p": 0.9},
    {"logit_bias": {5: 4.0, 1499: -3.0}, "top_k": 20},
    {"min_tokens": 3, "logit_bias": {EOS: 50.0}},
    {"repetition_penalty": 1.2, "logit_bias": {5: 4.0}, "min_tokens": 2, "temperature": 0.8},
]


def _sequence(slot: int, sampling: dict[str, Any], *, output: SequenceOf[int] = ()) -> Sequence:
    info = EngineInfo(vocab_size=VOCAB_SIZE, session_len=10_000, eos_token_ids=frozenset({EOS}))
    params = SamplingParams(**({"max_tokens": 1000, "seed": 1000 + slot} | sampling))
    request = Request(uid=str(slot), prompt_token_ids=[5, 6, 7, 7], sampling=params)
    sequence = new_sequence(request, info=info, rope_base_for=lambda n: 1e4)
    sequence.token_ids.extend(output)
    sequence.slot = slot
    return sequence


def _chunk(sequence: Sequence, *, drafts: tuple[int, ...] = ()) -> Chunk:
    known = sequence.num_tokens
    return Chunk(sequence, known - 1, 1 + len(drafts), is_sampled=True, draft_token_ids=drafts)


def _inputs(chunks: SequenceOf[Chunk]) -> tuple[torch.Tensor, torch.Tensor]:
    slots = [chunk.sequence.slot for chunk in chunks for _ in range(chunk.num_sampled_rows)]
    positions = [chunk.output_position + row for chunk in chunks for row in range(chunk.num_sampled_rows)]
    return tuple(torch.tensor(numbers, dtype=torch.int32, device=DEVICE) for numbers in (slots, positions))


def _admitted(sequences: SequenceOf[Sequence]) -> DeviceSampler:
    device_sampler = DeviceSampler(NUM_SLOTS, VOCAB_SIZE, DEVICE)
    for sequence in sequences:
        device_sampler.admit(sequence)
    return device_sampler


def _logits(num_rows: int, *, seed: int, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(num_rows, VOCAB_SIZE, generator=torch.Generator().manual_seed(seed)) * scale


def _sample(device_sampler: DeviceSampler, logits: torch.Tensor, chunks: SequenceOf[Chunk]) -> list[list[int]]:
    samples: list[list[int]] = device_sampler.sample(logits.to(DEVICE), *_inputs(chunks), chunks).tolist()
    return samples


@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_plain_rows_give_the_hosts_tokens(scale: float) -> None:
    sequences = [_sequence(NUM_SLOTS - 1 - index, sampling) for index, sampling in enumerate(PLAIN)]
    device_sampler = _admitted(sequences)
    for step in range(4):
        logits = _logits(len(sequences), seed=step, scale=scale)
        wanted = [sample.token_id for sample in sampler.sample(logits, sequences)]
        token_ids, is_valid = _sample(device_sampler, logits, [_chunk(sequence) for sequence in sequences])
        assert token_ids == wanted
        assert all(is_valid)
        for sequence, token_id in zip(sequences, wanted, strict=True):
            sequence.token_ids.append(token_id)


def test_edited_rows_follow_what_the_device_itself_sampled() -> None:
    """The device counts its own tokens: it is admitted once, and never told what it sampled."""
    sequences = [_sequence(slot, sampling, output=[9, 9]) for slot, sampling in enumerate(EDITED + PLAIN[:4])]
    device_sampler = _admitted(sequences)
    last_token_ids = torch.full((NUM_SLOTS,), -1, dtype=torch.int32, device=DEVICE)
    for step in range(5):
        logits = _logits(len(sequences), seed=step, scale=1.0)
        logits[:, 100:104] += 6.0  # so that tokens come again, and penalties tell
        kept = logits.clone()
        wanted = [sample.token_id for sample in sampler.sample(logits, sequences)]
        chunks = [_chunk(sequence) for sequence in sequences]
        on_device = logits.to(DEVICE)
        samples = device_sampler.sample(on_device, *_inputs(chunks), chunks, last_token_ids=last_token_ids)
        assert samples[0].tolist() == wanted
        assert samples[1].all()
        assert torch.equal(on_device.cpu(), kept), "logprobs come from the model's own logits"
        assert last_token_ids[: len(sequences)].tolist() == wanted
        assert (last_token_ids[len(sequences) :] == -1).all()
        for sequence, token_id in zip(sequences, wanted, strict=True):
            sequence.token_ids.append(token_id)


def test_a_slot_forgets_its_last_owner() -> None:
    """Parameters, counts, bias and bans go with a sequence; counts of a sequence that comes back are rebuilt."""
    device_sampler = _admitted([_sequence(0, EDITED[4], output=[11, 11]), _sequence(1, PLAIN[8])])
    successors = [_sequence(0, {"temperature": 0.0}), _sequence(1, EDITED[1], output=[100, 101, 101])]
    for sequence in successors:
        device_sampler.admit(sequence)
    logits = _logits(2, seed=8)
    logits[:, EOS] = 20.0
    wanted = [sample.token_id for sample in sampler.sample(logits, successors)]
    assert wanted[0] == EOS
    assert _sample(device_sampler, logits, [_chunk(sequence) for sequence in successors])[0] == wanted


def test_more_rows_than_are_copied_at_once_are_edited_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmdserve.engine.device_sampler.MOST_COPIED_LOGIT_ROWS", 4)
    sequences = [_sequence(slot, EDITED[1], output=[slot, 50, 50]) for slot in range(9)]
    logits = _logits(9, seed=1)
    wanted = [sample.token_id for sample in sampler.sample(logits, sequences)]
    assert _sample(_admitted(sequences), logits, [_chunk(sequence) for sequence in sequences])[0] == wanted


def test_rows_of_one_sequence_have_their_own_positions() -> None:
    """Speculative rows draw what the sequence would draw step by step; min_tokens ends between two of them."""
    sequence = _sequence(4, {"seed": 77, "top_p": 0.9, "min_tokens": 3}, output=[8])
    other = _sequence(2, {"seed": 5})
    chunks = [_chunk(other), _chunk(sequence, drafts=(10, 11, 12))]
    logits = _logits(5, seed=3)
    logits[:, EOS] = 12.0
    wanted = [
        sampled.token_id
        for sampled in sampler.sample_rows(
            logits, [sampler.SampleRow(other, 0), *(sampler.SampleRow(sequence, position) for position in range(1, 5))]
        )
    ]
    assert EOS not in wanted[1:3]
    assert EOS in wanted[3:]
    assert _sample(_admitted([other, sequence]), logits, chunks)[0] == wanted


def test_rows_without_a_choice_are_invalid_alone() -> None:
    sequences = [
        _sequence(0, {}),
        _sequence(1, {"temperature": 0.0}),
        _sequence(2, {"top_p": 0.5}),
        _sequence(3, {"logit_bias": {5: 1.0}}),
        _sequence(4, {"min_tokens": 1}),
        _sequence(5, {"top_k": 3}),
    ]
    logits = _logits(6, seed=0)
    logits[0, 700] = math.nan
    logits[1] = -math.inf
    logits[2, 9] = math.inf
    logits[3, 9] = math.nan
    logits[4] = -math.inf
    logits[4, EOS] = 1.0  # all that is left is banned
    token_ids, is_valid = _sample(_admitted(sequences), logits, [_chunk(sequence) for sequence in sequences])
    assert is_valid == [0, 0, 0, 0, 0, 1]
    assert all(0 <= token_id < VOCAB_SIZE for token_id in token_ids)
    assert token_ids[5] == sampler.sample(logits[5:], sequences[5:])[0].token_id


def test_masks_leave_allowed_tokens_only() -> None:
    sequences = [_sequence(0, {"temperature": 0.0}), _sequence(1, {}), _sequence(2, {"temperature": 0.0})]
    allowed = torch.zeros(2, -(-VOCAB_SIZE // 32), dtype=torch.int32)
    allowed[0, 40] = 1 << 5  # token 1285, for row 2
    allowed[1, 2] = (1 << 7) | (1 << 9)  # tokens 71 and 73, for row 1
    chunks = [_chunk(sequence) for sequence in sequences]
    logits = _logits(3, seed=0)
    masks = TokenMasks(rows=[2, 1], allowed=allowed.to(DEVICE))
    samples = _admitted(sequences).sample(logits.to(DEVICE), *_inputs(chunks), chunks, masks=masks)
    token_ids = samples[0].tolist()
    assert token_ids[0] == int(logits[0].argmax())
    assert token_ids[1] in (71, 73)
    assert token_ids[2] == 1285


def test_no_rows_are_fine() -> None:
    none = torch.zeros(0, dtype=torch.int32, device=DEVICE)
    assert _admitted([]).sample(torch.zeros(0, VOCAB_SIZE, device=DEVICE), none, none, []).shape == (2, 0)
