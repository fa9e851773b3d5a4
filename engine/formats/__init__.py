"""On-disk weight formats, one file each, all with the same functions.

    matches(scheme)                       is a linear of this quantization scheme stored in this format?
    tensor_specs(in, out, scheme, dtype)  the tensors a linear has on disk: suffix -> TensorSpec or DescriptionSpec
    read_weight(tensors, scheme)          the weight in them: a FourBitWeight, or of plain weights the tensor itself
    pack_linear(codes, zeros, scales)     the other way, in the 4-bit formats: suffix -> tensor
    GROUP_INDEX_SUFFIX                    the tensor that says which group each input is in, or None

Formats know nothing of families, names or fused modules: the loader joins q, k, v and gate, up along each tensor's
output axis before it reads.
"""

from types import ModuleType

from ..quantization_config import QuantizationScheme
from . import awq, compressed_tensors, gptq, hf
from .four_bit import FourBitWeight
from .spec import DescriptionSpec, Specs, TensorSpec

__all__ = ["DescriptionSpec", "FourBitWeight", "Specs", "TensorSpec", "find_format"]

_FORMATS: tuple[ModuleType, ...] = (hf, awq, gptq, compressed_tensors)


def find_format(scheme: QuantizationScheme | None) -> ModuleType:
    """Return the module of the format; quantization_config has already refused methods that none of them matches."""
    return next(module for module in _FORMATS if module.matches(scheme))
