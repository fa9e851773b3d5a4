"""A linear that is being loaded: tensors of one or more modules on disk, joined along their outputs until it is whole.

Owns the buffers in between. Names and families are `loader.py`'s, what a tensor looks like in its format `formats`'.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from .api import ConfigError
from .build_linear import Outputs, build_linear
from .formats import DescriptionSpec, Specs, TensorSpec, find_format
from .linear import Linear
from .quantization_config import QuantizationScheme


class Target(NamedTuple):
    """Where a tensor goes."""

    shape: tuple[int, ...]
    is_floating_point: bool
    place: Callable[[torch.Tensor], None]
    is_required: bool = True


class Module(NamedTuple):
    """One linear module on disk, and how its outputs are reordered when it goes to memory."""

    name: str
    out_features: int
    input_order: torch.Tensor | None  # int64 [in_features]; see input_order.py
    reorder: Callable[[torch.Tensor, TensorSpec], torch.Tensor] | None = None


class PendingLinear:
    """A linear of ours that is being filled from one or more modules on disk, joined along their outputs.

    The buffers exist from the first tensor to the last; then the linear is built and they are dropped.
    """

    def __init__(
        self,
        modules: Sequence[Module],
        in_features: int,
        *,
        has_bias: bool,
        scheme: QuantizationScheme | None,
        output_order: torch.Tensor | None,
        dtype: torch.dtype,
        device: torch.device,
        finish: Callable[[Linear], Any],
    ) -> None:
        self._modules = modules
        self._finish = finish
        self._format = find_format(scheme)
        self._scheme = scheme
        self._output_order = output_order
        self._dtype = dtype
        self._device = device
        self._buffers: dict[str, torch.Tensor] = {}
        self._built: Any = None
        self._num_unplaced = 0
        self.targets: dict[str, Target] = {}
        whole = self._specs(in_features, sum(module.out_features for module in modules), has_bias)
        offset = 0
        for module in modules:
            part = self._specs(in_features, module.out_features, has_bias)
            for suffix in part:
                self.targets[f"{module.name}.{suffix}"] = self._target(suffix, whole, part, offset, module)
            offset += module.out_features

    def result(self) -> Any:
        """Hand over what `finish` made of the linear; nothing here refers to it afterwards."""
        assert self._built is not None, "all names were checked before the first tensor was read"
        built, self._built = self._built, None
        self.targets.clear()
        return built

    def _specs(self, in_features: int, out_features: int, has_bias: bool) -> Specs:
        specs: Specs = self._format.tensor_specs(in_features, out_features, self._scheme, self._dtype)
        if has_bias:
            specs["bias"] = TensorSpec(shape=(out_features,), dtype=self._dtype, output_axis=0)
        return specs

    def _target(self, suffix: str, whole: Specs, part: Specs, offset: int, module: Module) -> Target:
        spec, whole_spec = part[suffix], whole[suffix]
        is_floating_point = spec.dtype.is_floating_point
        if isinstance(spec, DescriptionSpec) or isinstance(whole_spec, DescriptionSpec):
            assert isinstance(spec, DescriptionSpec)
            check = _checker(f"{module.name}.{suffix}", spec)
            return Target(spec.shape, is_floating_point, check, spec.is_required)
        self._num_unplaced += 1
        return Target(spec.shape, is_floating_point, self._placer(suffix, whole_spec, spec, offset, module))

    def _placer(
        self, suffix: str, whole: TensorSpec, part: TensorSpec, offset: int, module: Module
    ) -> Callable[[torch.Tensor], None]:
        def place(tensor: torch.Tensor) -> None:
            if suffix not in self._buffers:
                self._buffers[suffix] = torch.empty(whole.shape, dtype=whole.dtype, device=self._device)
            reordered = tensor if module.reorder is None else module.reorder(tensor, part)
            start, length = offset // part.outputs_per_element, part.shape[part.output_axis]
            self._buffers[suffix].narrow(whole.output_axis, start, length).copy_(reordered)
            self._num_unplaced -= 1
            if self._num_unplaced == 0:
                self._build()

        return place

    def _build(self) -> None:
        bias = self._buffers.pop("bias", None)
        linear = build_linear(
            self._format.read_weight(self._buffers, self._scheme),
            bias,
            [Outputs(module.out_features, module.input_order) for module in self._modules],
            output_order=self._output_order,
            dtype=self._dtype,
        )
        self._built = self._finish(linear)
        self._buffers = {}


def _checker(name: str, spec: DescriptionSpec) -> Callable[[torch.Tensor], None]:
    def check(tensor: torch.Tensor) -> None:
        complaint = spec.complaint(tensor)
        if complaint is not None:
            raise ConfigError(f"tensor {name} {complaint}")

    return check
