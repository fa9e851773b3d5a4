"""Sampling at a real vocabulary: the host's tokens, the distribution, and a captured graph that waits for nothing."""

import math
from collections import Counter
from collections.abc import Sequence as SequenceOf
from typing import Any

import pytest
import torch

from lmdserve.engine import sampler
from lmdserve.engine.api import EngineInfo, Request, SamplingParams
from lmdserve.engine.device_sampler import DeviceSampler
from lmdserve.engine.sequence import Sequence, new_sequence
from lmdserve.engine.step import Chunk
from lmdserve.kernels.sampling import find_best
from lmdserve.kernels.sampling_thresholds import limit_tokens
from lmdserve.kernels.sampling_weights import NUM_PARAMETERS, TEMPERATURE, TOP_P, sampling_scratch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

VOCAB_SIZE = 92544
KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {},
    {"temperature": 0.8, "top_p": 0.8, "top_k": 40},
    {"top_p": 0.95},
    {"top_k": 50},
    {"top_k": 5000, "top_p": 0.99},
    {"min_p": 0.02},
    {"temperature": 2.0, "top_p": 0.9},
    {"temperature": 0.7, "repetition_penalty": 1.1, "frequency_penalty": 0.2},
    {"temperature": 0.0, "logit_bias": {7: 3.0}, "min_tokens": 2},
]


def _sequences(kinds: SequenceOf[dict[str, Any]]) -> list[Sequence]:
    info = EngineInfo(vocab_size=VOCAB_SIZE, session_len=10_000, eos_token_ids=frozenset({2}))
    sequences = []
    for slot, kind in enumerate(kinds):
        params = SamplingParams(**({"max_tokens": 1000, "seed": 31 * slot} | kind))
        request = Request(uid=str(slot), prompt_token_ids=[5, 6, 7, 7], sampling=params)
        sequence = new_sequence(request, info=info, rope_base_for=lambda n: 1e4)
        sequence.slot = slot
        sequences.append(sequence)
    return sequences


def _numbers(values: SequenceOf[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device="cuda")


def _admitted(sequences: SequenceOf[Sequence], num_slots: int = 256) -> DeviceSampler:
    device_sampler = DeviceSampler(num_slots, VOCAB_SIZE, torch.device("cuda"))
    for sequence in sequences:
        device_sampler.admit(sequence)
    return device_sampler


@pytest.mark.parametrize("num_rows", [1, 10, 256])
@pytest.mark.parametrize("scale", [1.0, 2.5, 6.0], ids=["flat", "usual", "peaked"])
def test_tokens_are_the_hosts(num_rows: int, scale: float) -> None:
    """Flat rows make the thresholds be searched again between closer edges. exp() of the device and of the host differ
    in their last bits, so one draw in some ten thousand may lie on another side of a boundary.
    """
    offset = 3 if num_rows == 1 else 0
    sequences = _sequences([KINDS[(index + offset) % len(KINDS)] for index in range(num_rows)])
    device_sampler = _admitted(sequences)
    slots = _numbers(range(num_rows))
    last_token_ids = torch.zeros(256, dtype=torch.int32, device="cuda")
    num_different = 0
    for step in range(3):
        logits = torch.randn(num_rows, VOCAB_SIZE, generator=torch.Generator().manual_seed(step)) * scale
        chunks = [Chunk(sequence, sequence.num_tokens - 1, 1, is_sampled=True) for sequence in sequences]
        samples = device_sampler.sample(
            logits.cuda(), slots, _numbers([step] * num_rows), chunks, last_token_ids=last_token_ids
        )
        assert samples[1].all()
        token_ids = samples[0].tolist()
        assert last_token_ids[:num_rows].tolist() == token_ids
        wanted = [sample.token_id for sample in sampler.sample(logits, sequences)]
        for sequence, mine, host in zip(sequences, token_ids, wanted, strict=True):
            assert mine == host or sequence.sampling.temperature > 0, "greedy rows are exact"
            num_different += mine != host
            sequence.token_ids.append(mine)
    assert num_different <= num_rows // 100


@pytest.mark.parametrize("sampling", [{}, {"top_k": 6}, {"top_p": 0.7}, {"min_p": 0.2, "temperature": 1.3}], ids=str)
def test_draws_follow_their_distribution(sampling: dict[str, Any]) -> None:
    """2000 draws from one row, as rows of one sequence at rising positions; compared at about four deviations."""
    sequence = _sequences([sampling])[0]
    chunk = Chunk(sequence, sequence.num_tokens - 1, 2000, is_sampled=True, draft_token_ids=(0,) * 1999)
    logits = torch.full((1, VOCAB_SIZE), -40.0)
    logits[0, ::9000] = torch.linspace(0.0, 3.0, 11)
    rows = logits.cuda().expand(2000, -1)
    samples = _admitted([sequence]).sample(rows, _numbers([0] * 2000), _numbers(range(2000)), [chunk])
    weights = ((logits[0] - 3.0) / sampling.get("temperature", 1.0)).exp()
    kept = weights * (weights >= max(sampler._thresholds(weights[None], [SamplingParams(**sampling)]).item(), 1e-9))
    counts = Counter(samples[0].tolist())
    assert set(counts) <= set(kept.nonzero().flatten().tolist())
    for token_id, share in enumerate((kept / kept.sum()).tolist()):
        deviation = math.sqrt(2000 * share * (1 - share))
        assert abs(counts[token_id] - 2000 * share) <= 4 * deviation + 1


def test_what_top_p_keeps_of_a_deterministic_row_is_its_own_business() -> None:
    """The row's weight is a sum over parts. Flat rows: its last bit decides on one token more or less in a few rows."""
    logits = torch.randn(256, VOCAB_SIZE, device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    parameters = torch.zeros(1, NUM_PARAMETERS.value, dtype=torch.float64, device="cuda")
    parameters[0, TEMPERATURE.value], parameters[0, TOP_P.value] = 1.0, 0.95
    scratch = sampling_scratch(256, VOCAB_SIZE, logits.device)

    def thresholds(rows: torch.Tensor) -> torch.Tensor:
        slots, samples = _numbers([0] * len(rows)), _numbers([0] * 2 * len(rows)).view(2, -1)
        find_best(rows, slots, parameters, samples, scratch, deterministic=True)
        limit_tokens(rows, slots, parameters, scratch, deterministic=True)
        return scratch.thresholds[: len(rows)].clone()

    assert torch.equal(torch.cat([thresholds(rows) for rows in logits.split(5)]), thresholds(logits))


def test_a_captured_graph_follows_the_slots() -> None:
    """One graph, replayed for other logits, other positions and other owners of its slots."""
    sequences = _sequences(KINDS[:8])
    device_sampler = _admitted(sequences)
    logits, slots = torch.zeros(8, VOCAB_SIZE, device="cuda"), _numbers(range(8))
    positions = _numbers([0] * 8)
    device_sampler.sample(logits, slots, positions, None)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        samples = device_sampler.sample(logits, slots, positions, None)
    for step in range(3):
        if step == 2:
            sequences = _sequences([*reversed(KINDS[:8])])
            for sequence in sequences:
                device_sampler.admit(sequence)
        values = torch.randn(8, VOCAB_SIZE, generator=torch.Generator().manual_seed(step)) * 2
        logits.copy_(values)
        graph.replay()
        assert samples[0].tolist() == [sample.token_id for sample in sampler.sample(values, sequences)]


def test_nothing_waits_for_the_device() -> None:
    """Admission and a step with every kind of row and edit, with waits forbidden."""
    sequences = _sequences(KINDS)
    device_sampler = _admitted(sequences)
    logits = torch.randn(len(KINDS), VOCAB_SIZE, device="cuda")
    slots, positions = _numbers(range(len(KINDS))), _numbers([0] * len(KINDS))
    chunks = [Chunk(sequence, 3, 1, is_sampled=True) for sequence in sequences]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for sequence in sequences:
            device_sampler.admit(sequence)
        samples = device_sampler.sample(logits, slots, positions, chunks)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert samples[1].all()
