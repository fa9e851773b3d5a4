"""The sampling kernels on their own: what a row of any shape gives, and that they compile. Agreement with the host's
sampler is tests/engine/test_device_sampler.py's business."""

import math

import pytest
import torch
from offline_compile import assert_fits, compile_for_all

from lmdserve.kernels.logit_edits import _edit_kernel, _record_kernel, ban_tokens, penalize
from lmdserve.kernels.sampling import _draw_kernel, _peaks_kernel, find_best
from lmdserve.kernels.sampling_head import _head_kernel
from lmdserve.kernels.sampling_thresholds import _measures_kernel, _thresholds_kernel, limit_tokens
from lmdserve.kernels.sampling_weights import MIN_P, NUM_PARAMETERS, TEMPERATURE, TOP_K, TOP_P, sampling_scratch

POINTERS = {
    "logits": "*fp32", "row_slots": "*i32", "output_positions": "*i32", "parameters": "*fp64", "seed_hashes": "*i64",
    "samples": "*i32", "arrivals": "*i32", "part_peaks": "*fp32", "part_ids": "*i32", "part_masses": "*fp32",
    "tile_peaks": "*fp32", "head_tiles": "*i32", "is_open": "*i32", "peaks": "*fp32",
    "thresholds": "*fp32", "counts": "*i32", "masses": "*fp64", "lists": "*fp32",
    "tile_masses": "*fp64", "seen": "*i32", "mask_rows": "*i32", "allowed": "*i32", "token_ids": "*i32",
    "last_token_ids": "*i32",
}  # fmt: skip
CONSTEXPRS = {
    _peaks_kernel: (4, {"MOST_PARTS": 128, "PEAK_TILE": 128, "BLOCK": 1024}),
    _head_kernel: (
        8,
        {
            "MOST_PARTS": 128, "PEAK_TILE": 128, "TILES": 1024, "FEWEST_TILES": 128, "MOST_TILES": 256,
            "TILES_AT_ONCE": 16, "HEAD_SIZE": 2048,
        },
    ),
    _measures_kernel: (8, {"MOST_PARTS": 128, "BLOCK": 512}),
    _thresholds_kernel: (16, {"MOST_PARTS": 128, "BLOCK": 512, "LIST_SIZE": 8192, "LIST_BLOCK": 4096}),
    _draw_kernel: (4, {"TILES": 128, "DRAW_TILES": 4, "BLOCK": 1024}),
    _edit_kernel: (4, {"HAS_SEEN": True, "HAS_MASKS": True, "BLOCK": 1024}),
    _record_kernel: (4, {"COUNT": 2, "BLOCK": 128}),
}  # fmt: skip


def _parameters(rows: list[dict[int, float]], device: torch.device) -> torch.Tensor:
    """Return a slot's parameters for each row; what is not given changes nothing."""
    table = torch.zeros(len(rows), NUM_PARAMETERS.value, dtype=torch.float64)
    table[:, TOP_P.value] = 1.0
    for row, columns in enumerate(rows):
        for column, value in columns.items():
            table[row, column] = value
    return table.to(device)


def _logits(num_rows: int, vocab_size: int, device: torch.device, *, scale: float = 2.0) -> torch.Tensor:
    return (torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(vocab_size)) * scale).to(device)


def _thresholds(logits: torch.Tensor, columns: dict[int, float]) -> torch.Tensor:
    """Return what the kernels find for rows with these parameters."""
    num_rows, vocab_size = logits.shape
    scratch = sampling_scratch(num_rows, vocab_size, logits.device)
    slots = torch.arange(num_rows, dtype=torch.int32, device=logits.device)
    parameters = _parameters([{TEMPERATURE.value: 1.0} | columns] * num_rows, logits.device)
    find_best(logits, slots, parameters, torch.empty(2, num_rows, dtype=torch.int32, device=logits.device), scratch)
    limit_tokens(logits, slots, parameters, scratch)
    return scratch.thresholds.cpu()


@pytest.mark.parametrize("vocab_size", [1, 63, 1000, 5001])
def test_the_best_of_a_row_is_the_first_of_equals(vocab_size: int, device: torch.device) -> None:
    logits = _logits(4, vocab_size, device)
    logits[1, vocab_size // 2 :] = 99.0
    logits[2] = -math.inf
    logits[3, -1] = math.nan
    samples = torch.full((2, 4), -7, dtype=torch.int32, device=device)
    slots = torch.zeros(4, dtype=torch.int32, device=device)
    scratch = sampling_scratch(5, vocab_size, device)
    for _ in range(2):  # what the first call leaves in the scratch memory must not matter to the second
        find_best(logits, slots, _parameters([{}], device), samples, scratch)
        assert samples[0, :2].tolist() == [int(logits[0].argmax()), vocab_size // 2]
        assert samples[1].tolist() == [1, 1, 0, 0]
        assert 0 <= int(samples[0].min()) <= int(samples[0].max()) < vocab_size


@pytest.mark.parametrize("scale", [0.001, 0.3, 4.0], ids=["level", "flat", "peaked"])
@pytest.mark.parametrize("vocab_size", [700, 9000])
def test_thresholds_are_exact(vocab_size: int, scale: float, device: torch.device) -> None:
    """Peaked rows end with their heaviest tokens. 9000 tokens of nearly one weight do not fit into the list either, so
    the row is measured again between closer edges.
    """
    logits = _logits(2, vocab_size, device, scale=scale)
    weights = (logits - logits.max(-1, keepdim=True).values).exp().cpu()
    in_order = weights.sort(-1, descending=True).values
    cumulative = in_order.double().cumsum(-1)
    for top_k in (1, 40, vocab_size - 1):
        thresholds = _thresholds(logits, {TOP_K.value: top_k})
        torch.testing.assert_close(thresholds, in_order[:, top_k - 1], rtol=1e-6, atol=0)
        kept = (weights >= thresholds[:, None] * (1 - 1e-6)).sum(-1)
        assert (kept >= top_k).all()
    for top_p in (0.0, 0.3, 0.95):
        thresholds = _thresholds(logits, {TOP_P.value: top_p})
        last = torch.searchsorted(cumulative, top_p * cumulative[:, -1:])
        torch.testing.assert_close(thresholds, in_order.gather(-1, last)[:, 0], rtol=2e-6, atol=0)


def test_equal_weights_at_the_cut_have_one_threshold(device: torch.device) -> None:
    """All weights equal: no edge can part them, and none needs to."""
    logits = torch.zeros(1, 6000, device=device)
    assert _thresholds(logits, {TOP_K.value: 10}).item() == 1.0
    assert _thresholds(logits, {TOP_P.value: 0.5}).item() == 1.0
    logits[0, 3000:] = -math.inf
    assert _thresholds(logits, {TOP_K.value: 5000}).item() == 0.0
    assert _thresholds(logits, {TOP_P.value: 0.9, MIN_P.value: 0.25}).item() == 1.0


def test_penalties_are_the_hosts(device: torch.device) -> None:
    """Slot 0 has penalties and the second row of counts, slot 1 has none."""
    logits = _logits(2, 1500, device)
    seen = torch.full((2, 1500), 77, dtype=torch.int32, device=device)
    seen[1] = 0
    seen[1, [3, 9, 1400]] = torch.tensor([1, 2, 7], dtype=torch.int32, device=device)  # prompt; once; both, 3 times
    parameters = _parameters([{4: 1.5, 5: 0.4, 6: 0.25, 8: 1}, {4: 9.0, 8: -1}], device)
    wanted = logits.cpu().clone()
    for token_id, count in ((3, 0), (9, 1), (1400, 3)):
        value = wanted[0, token_id]
        repeated = value / 1.5 if value > 0 else value * 1.5
        wanted[0, token_id] = repeated - count * 0.25 - (0.4 if count else 0.0)
    penalize(logits, torch.tensor([0, 1], dtype=torch.int32, device=device), parameters, seen)
    torch.testing.assert_close(logits.cpu(), wanted)


def test_a_mask_bans_the_tokens_whose_bits_are_0(device: torch.device) -> None:
    logits = _logits(3, 1337, device)
    is_allowed = torch.rand(2, 1337, generator=torch.Generator().manual_seed(0)) < 0.5
    words = torch.zeros(2, 42, dtype=torch.int64)
    for token_id in range(1337):
        words[:, token_id // 32] |= is_allowed[:, token_id].long() << (token_id % 32)
    allowed = words.to(torch.int32).to(device)
    wanted = logits.cpu().clone()
    wanted[0, ~is_allowed[1]] = -math.inf
    wanted[2, ~is_allowed[0]] = -math.inf
    ban_tokens(logits, torch.tensor([1, -1, 0], dtype=torch.int32, device=device), allowed)
    assert torch.equal(logits.cpu(), wanted)


def test_shapes_that_do_not_fit_are_refused(device: torch.device) -> None:
    logits, slots = torch.zeros(3, 64, device=device), torch.zeros(3, dtype=torch.int32, device=device)
    samples = torch.zeros(2, 3, dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match="is for 2 rows of 64"):
        find_best(logits, slots, _parameters([{}], device), samples, sampling_scratch(2, 64, device))
    with pytest.raises(ValueError, match=r"samples has to be \(2, 3\)"):
        find_best(logits, slots, _parameters([{}], device), samples[:, :2], sampling_scratch(4, 64, device))
    with pytest.raises(ValueError, match="in 2 words of 32"):
        ban_tokens(logits, slots, torch.zeros(1, 3, dtype=torch.int32, device=device))
    with pytest.raises(ValueError, match="as many counts as logits"):
        penalize(logits, slots, _parameters([{}], device), torch.zeros(1, 63, dtype=torch.int32, device=device))


@pytest.mark.parametrize("kernel", CONSTEXPRS, ids=lambda kernel: kernel.fn.__name__)
def test_it_compiles_for_every_architecture(kernel: object) -> None:
    num_warps, constexprs = CONSTEXPRS[kernel]
    names = [name for name in kernel.arg_names if name not in constexprs and name != "PDL"]
    signature = {name: POINTERS.get(name, "i32:16") for name in names}
    for compiled in compile_for_all(kernel, signature, constexprs, num_warps=num_warps).values():
        assert_fits(compiled)
