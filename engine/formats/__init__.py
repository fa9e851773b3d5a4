"""On-disk weight formats, one file each, all with the same three functions.

    matches(quantization)                       is this the format of a linear with this quantization_config?
    tensor_specs(in, out, quantization, dtype)  the tensors a linear has on disk: suffix -> TensorSpec
    build_linear(tensors, quantization, dtype)  the linear that computes with them

Formats know nothing of families, names or fused modules: the loader joins q, k, v and gate, up along each tensor's
output axis before it builds.
"""

from types import ModuleType

from ..model_config import QuantizationConfig
from . import awq, hf
from .spec import TensorSpec

__all__ = ["TensorSpec", "find_format"]

_FORMATS: tuple[ModuleType, ...] = (hf, awq)


def find_format(quantization: QuantizationConfig | None) -> ModuleType:
    """Return the module of the format; model_config has already refused methods that none of them matches."""
    return next(module for module in _FORMATS if module.matches(quantization))
