"""The 16-bit model's answers to the evaluation text, computed a layer at a time: it is never in memory as a whole.

So a model can be measured on any GPU that it can be quantized on. Products are in the type that the model is served in,
and what layers add up is float32, as in the engine.
"""

from collections.abc import Callable

import torch
from torch.nn import functional

from lmdserve.kernels import reference

from ..config import EngineConfig
from ..memory import resolve_dtype_name
from .evaluation import Reference, reference_from
from .hidden_states import HiddenStates
from .layer import Layer, Rotary
from .quality import QualityRow
from .source import SourceModel


def layered_reference(
    source: SourceModel,
    windows: torch.Tensor,
    *,
    batch_size: int,
    device: torch.device,
    on_share_done: Callable[[float], None],
) -> tuple[Reference, QualityRow]:
    """Return what a quantized model is measured against on windows (int64 [num_windows, seqlen]), and its own row."""
    config = source.config
    dtype: torch.dtype = getattr(torch, resolve_dtype_name(EngineConfig(), config, device.type))
    states = HiddenStates(windows, source.embedding().float(), batch_size=batch_size, device=device)
    rotary = Rotary(config, windows.shape[1], dtype, device)
    for index in range(config.num_layers):
        layer = Layer(config, source.layer(index, device).to(dtype))
        for number, batch in enumerate(states.batches()):
            states.replace(number, layer.forward(batch, rotary))
        on_share_done((index + 1) / config.num_layers)
    norm, head = (weight.to(device) for weight in source.final_norm_and_head())
    normed = [
        reference.rms_norm(batch, norm.float(), config.rms_norm_eps).to("cpu", dtype) for batch in states.batches()
    ]
    head = head.to(dtype)
    return reference_from(
        windows, torch.cat(normed), lambda rows: functional.linear(rows, head).float(), config, device
    )
