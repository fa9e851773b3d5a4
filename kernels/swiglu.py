"""silu(gate) * up (Shazeer, 2020), for products whose kernel does not do it itself: weights of 16 bits."""

import torch
import triton
import triton.language as tl

from .launch import launch, release_next_kernel, wait_for_previous_kernel

_BLOCK = 1024


@triton.jit
def _swiglu_kernel(  # type: ignore[no-untyped-def]
    gate_up,
    out,
    num_columns,
    gate_up_stride,
    out_stride,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_inside = columns < num_columns
    wait_for_previous_kernel(PDL)
    gates = gate_up + row * gate_up_stride + columns
    gate = tl.load(gates, mask=is_inside, other=0.0).to(tl.float32)
    up = tl.load(gates + num_columns, mask=is_inside, other=0.0).to(tl.float32)
    release_next_kernel(PDL)
    decay = tl.exp(-tl.abs(gate))  # at most 1: nothing overflows
    activated = gate * tl.where(gate < 0.0, decay, 1.0) / (1.0 + decay) * up
    tl.store(out + row * out_stride + columns, activated.to(out.dtype.element_ty), mask=is_inside)


def swiglu(gate_up: torch.Tensor, out: torch.Tensor) -> None:
    """Write silu(gate) * up to out [M, I] for gate_up [M, 2 * I], the gates in its first half; computed in fp32.

    Any float types; columns adjacent. Raises ValueError when shapes do not fit.
    """
    num_rows, num_columns = out.shape
    if gate_up.shape != (num_rows, 2 * num_columns) or gate_up.stride(1) != 1 or out.stride(1) != 1:
        raise ValueError(
            f"swiglu got gate_up {tuple(gate_up.shape)} and out {tuple(out.shape)}; gate_up has to be twice as wide as "
            "out, both with adjacent columns"
        )
    if num_rows == 0:
        return
    launch(
        _swiglu_kernel,
        (num_rows, triton.cdiv(num_columns, _BLOCK)),
        out.device,
        gate_up,
        out,
        num_columns,
        gate_up.stride(0),
        out.stride(0),
        BLOCK=_BLOCK,
        num_warps=4,
    )
