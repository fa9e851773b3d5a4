"""Rotary angles: against fp64 at near and far positions, and against the reference's convention."""

import math

import pytest
import torch
from offline_compile import assert_fits, compile_for_all

from lmdserve.kernels import reference
from lmdserve.kernels.rope_tables import _rope_tables_kernel, rope_tables


def _frequencies(base: float, num_pairs: int) -> torch.Tensor:
    return 1.0 / base ** (torch.arange(num_pairs) / num_pairs)


def _tables(
    positions: torch.Tensor, frequencies: torch.Tensor, table_rows: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (len(positions), frequencies.shape[1])
    cosines, sines = (torch.full(shape, math.nan, device=positions.device) for _ in range(2))
    rope_tables(positions, frequencies, table_rows, cosines, sines)
    return cosines, sines


def test_every_position_is_accurate(device: torch.device) -> None:
    """The angles are fp32, as in the reference; of those, cosine and sine are right to the last digit but one."""
    positions = torch.cat((torch.arange(-1, 40), torch.arange(65_000, 262_144, 3001), torch.tensor([262_143, 2**24])))
    frequencies = _frequencies(1e6, 64)
    angles = (positions.float()[:, None] * frequencies).double()
    cosines, sines = _tables(positions.int().to(device), frequencies[None].to(device), None)
    assert (cosines.cpu().double() - angles.cos()).abs().max() < 1.2e-7
    assert (sines.cpu().double() - angles.sin()).abs().max() < 1.2e-7


def test_each_row_has_its_own_frequencies(device: torch.device) -> None:
    frequencies = torch.stack([_frequencies(base, 24) for base in (1e4, 5e5, 1e6)])
    positions, rows = torch.tensor([5, 70_000, 123, 9, 0]), torch.tensor([2, 0, 1, 2, 1])
    cosines, sines = _tables(positions.int().to(device), frequencies.to(device), rows.int().to(device))
    wanted_cosines, wanted_sines = reference.rope_tables(positions, frequencies[rows])
    torch.testing.assert_close(cosines.cpu(), wanted_cosines[:, 0, :24], rtol=0, atol=3e-7)
    torch.testing.assert_close(sines.cpu(), wanted_sines[:, 0, 24:], rtol=0, atol=3e-7)


def test_no_rows_and_wrong_shapes(device: torch.device) -> None:
    none, frequencies = torch.empty(0, dtype=torch.int32, device=device), torch.ones(1, 8, device=device)
    assert _tables(none, frequencies, none)[0].shape == (0, 8)
    wrong = torch.empty(2, 8, device=device)
    with pytest.raises(ValueError, match="both have to be"):
        rope_tables(torch.zeros(3, dtype=torch.int32, device=device), frequencies, None, wrong, wrong)


def test_it_compiles_for_every_architecture() -> None:
    signature = {
        "positions": "*i32", "frequencies": "*fp32", "table_rows": "*i32", "cosines": "*fp32", "sines": "*fp32",
        "size": "i32:16", "num_pairs": "i32:16",
    }  # fmt: skip
    constexprs = {"HAS_TABLE_ROWS": True, "BLOCK": 128}
    for kernel in compile_for_all(_rope_tables_kernel, signature, constexprs).values():
        assert_fits(kernel)
