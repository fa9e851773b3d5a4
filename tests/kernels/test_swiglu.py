"""SwiGLU against torch's silu in fp64."""

import math

import pytest
import torch
from offline_compile import assert_fits, compile_for_all

from lmdserve.kernels.swiglu import _swiglu_kernel, swiglu

TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 8e-3}  # one rounding of the type


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("num_rows", "num_columns"), [(1, 1), (3, 1000), (5, 2049), (0, 8)])
def test_it_is_silu_of_the_gate_times_up(
    dtype: torch.dtype, num_rows: int, num_columns: int, device: torch.device
) -> None:
    values = torch.randn(num_rows, 2 * num_columns, generator=torch.Generator().manual_seed(1)) * 4
    gate_up = values.to(device, dtype)
    out = torch.full((num_rows, num_columns + 1), math.nan, dtype=dtype, device=device)
    swiglu(gate_up, out[:, :num_columns])
    gate, up = gate_up.double().chunk(2, -1)
    wanted = (torch.nn.functional.silu(gate) * up).float()
    torch.testing.assert_close(out[:, :num_columns].float(), wanted, rtol=TOLERANCE[dtype], atol=1e-4)
    assert out[:, num_columns:].isnan().all()


def test_far_gates_neither_overflow_nor_vanish_wrongly(device: torch.device) -> None:
    gate_up = torch.tensor([[-60000.0, -90.0, 90.0, 60000.0, 1.0, 1.0, 2.0, 1.0]], device=device)
    out = torch.full((1, 4), math.nan, device=device)
    swiglu(gate_up, out)
    torch.testing.assert_close(out, torch.tensor([[0.0, 0.0, 180.0, 60000.0]], device=device))


def test_wrong_shapes_are_refused(device: torch.device) -> None:
    with pytest.raises(ValueError, match="twice as wide"):
        swiglu(torch.zeros(2, 6, device=device), torch.zeros(2, 4, device=device))


def test_it_compiles_for_every_architecture() -> None:
    signature = {
        "gate_up": "*fp16", "out": "*fp16", "num_columns": "i32:16", "gate_up_stride": "i32:16", "out_stride": "i32:16",
    }  # fmt: skip
    for kernel in compile_for_all(_swiglu_kernel, signature, {"BLOCK": 1024}).values():
        assert_fits(kernel)
