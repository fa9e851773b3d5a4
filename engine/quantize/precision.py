"""Where a run computes, in which type, and in which type the checkpoint is stored."""

import logging
from collections.abc import Mapping

import torch

from ..api import ConfigError
from ..config import Device
from .options import StoredDtype

logger = logging.getLogger(__name__)

# What scales are rounded to while the checkpoint's type is not known yet.
SCALE_DTYPES: Mapping[StoredDtype, torch.dtype] = {
    "auto": torch.float16,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
_LARGEST_FLOAT16 = 65504
_LARGEST_FLOAT16_ACTIVATION = _LARGEST_FLOAT16 / 4  # on other text they may be larger than those seen


def choose_device(device: Device) -> torch.device:
    """Return the device for an option; ConfigError when there is no GPU where one was asked for."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch finds no GPU; give --device cpu, or check the driver")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def compute_dtype(device: torch.device) -> torch.dtype:
    """Return what layers are computed in: bfloat16 where its products are fast, on GPUs and on CPUs with AMX.

    Never float16: activations that it cannot hold are common. A core of a Xeon multiplied at 65 GFLOP/s in float32 and
    at 790 in bfloat16.
    """
    has_fast_bfloat16 = device.type == "cuda" or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if has_fast_bfloat16 else torch.float32


def stored_dtype(option: StoredDtype, *, largest_activation: float, largest_weight: float) -> torch.dtype:
    """Return the type of a checkpoint; "auto" leaves float16 when activations or weights would not fit.

    ConfigError when float16 was asked for and cannot hold a weight.
    """
    if option == "bfloat16":
        return torch.bfloat16
    if option == "float16" and largest_weight > _LARGEST_FLOAT16:
        raise ConfigError(
            f"a weight that is not quantized reaches {largest_weight:.0f}, and float16 ends at {_LARGEST_FLOAT16}; "
            "leave --dtype out, or give --dtype bfloat16"
        )
    if largest_activation <= _LARGEST_FLOAT16_ACTIVATION and largest_weight <= _LARGEST_FLOAT16:
        return torch.float16
    logger.warning(
        "activations reach %.0f and weights %.0f, and float16 ends at %d: %s",
        largest_activation,
        largest_weight,
        _LARGEST_FLOAT16,
        "the checkpoint is bfloat16" if option == "auto" else "serve it in bfloat16",
    )
    return torch.bfloat16 if option == "auto" else torch.float16
