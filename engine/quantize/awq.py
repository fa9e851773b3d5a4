"""One layer by AWQ: search the scales, fold them into what comes before, search ranges, round.

Owns which linears share a scale and where it is folded: that of qkv into the norm before attention, that of gate and up
into the norm before the MLP, that of the output projection into the rows of v, that of down into the rows of up. A row
of a weight may be scaled for nothing, because each of its groups has a scale of its own. With grouped queries several
inputs of the output projection come from one row of v, and they get one scale (which took 3 % off the demo model's
divergence; AutoAWQ leaves them without). Errors are measured where the paper does: after the attention block for qkv,
after the MLP for gate and up, after the linear itself for the other two.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch.nn import functional

from ..model_config import ModelConfig
from .architectures import LinearKey, LinearPlan
from .layer import Layer, LayerWeights, Rotary
from .rounding import RoundedWeight, Rounding, full_range, round_weight
from .search import search_range, search_scale
from .statistics import InputStatistics

_WORST_ERROR = 0.5  # a linear that loses this part of its output to rounding stays as it is
_WORD_OUTPUTS = 8  # outputs that share a packed word


@dataclass(frozen=True, slots=True)
class Searches:
    """Which searches to do."""

    scale: bool
    clip: bool


@dataclass(slots=True)
class LayerSample:
    """What a layer is searched on."""

    statistics: Mapping[LinearKey, InputStatistics]
    beginnings: torch.Tensor  # hidden states [num_windows, num_tokens, hidden_size] before the layer
    rotary: Rotary  # for these num_tokens


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one linear: its error relative to its output, and why it is not in 4 bits if it is not."""

    linear: LinearKey
    relative_error: float
    reason: str | None


@dataclass(slots=True)
class QuantizedLayer:
    """A layer's result. Rows of linears are in the order of `LinearPlan`, tensors on the device."""

    norms: dict[str, torch.Tensor]  # float32
    rounded: dict[LinearKey, RoundedWeight] = field(default_factory=dict)
    kept: dict[LinearKey, torch.Tensor] = field(default_factory=dict)  # float32
    biases: dict[LinearKey, torch.Tensor] = field(default_factory=dict)  # float32
    outcomes: list[Outcome] = field(default_factory=list)


class LayerQuantizer:
    """Quantizes layer after layer of one model."""

    def __init__(
        self,
        config: ModelConfig,
        plans: Mapping[LinearKey, LinearPlan],
        rounding: Rounding,
        searches: Searches,
    ) -> None:
        self._config = config
        self._plans = plans
        self._rounding = rounding
        self._searches = searches
        self._misfits = {key: reason for key, plan in plans.items() if (reason := self._misfit(plan))}

    @property
    def misfits(self) -> Mapping[LinearKey, str]:
        """The linears whose sizes no checkpoint of this format can hold, and why."""
        return self._misfits

    def quantize(self, layer: Layer, stored: LayerWeights, sample: LayerSample | None) -> QuantizedLayer:
        """Quantize one layer, `stored` as its checkpoint has it. Without a sample it is only rounded."""
        scales = {} if sample is None or not self._searches.scale else self._search_scales(layer, stored, sample)
        result = QuantizedLayer(_scaled_norms(stored.norms, scales))
        for key, linear in stored.linears.items():
            weight = linear.weight.to(torch.float32, copy=True)
            bias = None if linear.bias is None else linear.bias.float()
            row_scale = self._row_scale(key, scales)
            if row_scale is not None:
                weight.div_(row_scale.unsqueeze(1))
                bias = None if bias is None else bias / row_scale
            if bias is not None:
                result.biases[key] = bias
            self._round(key, weight, scales.get(key), sample, result)
        return result

    def _round(
        self,
        key: LinearKey,
        weight: torch.Tensor,
        scale: torch.Tensor | None,
        sample: LayerSample | None,
        result: QuantizedLayer,
    ) -> None:
        if scale is not None:
            weight.mul_(scale)
        if key in self._misfits:
            result.kept[key] = weight
            result.outcomes.append(Outcome(key, 0.0, self._misfits[key]))
            return
        inputs = None if sample is None else sample.statistics[key]
        low, high = self._ranges(weight, scale, inputs)
        rounded = round_weight(weight, low, high, self._rounding)
        error = _relative_error(weight, rounded.dequantized(), scale, inputs)
        reason = self._unrepresentable(rounded, error)
        result.outcomes.append(Outcome(key, 0.0 if reason else error, reason))
        if reason is None:
            result.rounded[key] = rounded
        else:
            result.kept[key] = weight

    def _ranges(
        self, weight: torch.Tensor, scale: torch.Tensor | None, inputs: InputStatistics | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if inputs is None or inputs.products is None or not self._searches.clip:
            return full_range(self._rounding.grouped(weight))
        products = inputs.products
        if scale is not None:
            by_group = scale.view(products.shape[0], -1)
            products = products / by_group.unsqueeze(1) / by_group.unsqueeze(2)
        return search_range(weight, products, self._rounding)

    def _unrepresentable(self, rounded: RoundedWeight, error: float) -> str | None:
        if not rounded.scales.isfinite().all():
            return f"a scale is past the range of {rounded.scales.dtype}"
        if not error <= _WORST_ERROR:
            return f"rounding would lose {error:.0%} of its output"
        return None

    def _misfit(self, plan: LinearPlan) -> str | None:
        if self._rounding.num_groups(plan.in_features) == 0:
            return f"its {plan.in_features} inputs do not divide into groups of {self._rounding.group_size}"
        # wqkv is taken apart by heads, whose words must not be shared.
        sizes = [size for _, size in plan.modules] if plan.disk_rows is None else [self._config.head_dim]
        if any(size % _WORD_OUTPUTS for size in sizes):
            return f"its outputs do not divide into words of {_WORD_OUTPUTS}"
        return None

    def _search_scales(self, layer: Layer, stored: LayerWeights, sample: LayerSample) -> dict[LinearKey, torch.Tensor]:
        """Return the scale of each linear's inputs, float32 [in_features], where it can be folded."""
        errors = {
            "qkv": _attention_error(layer, sample),
            "output": _linear_error(layer, "output", sample),
            "gate_up": _mlp_error(layer, sample),
            "down": _linear_error(layer, "down", sample),
        }
        scales: dict[LinearKey, torch.Tensor] = {}
        for key in (key for key in self._plans if key not in self._misfits):
            magnitude = sample.statistics[key].mean_magnitude
            share, expand = (self._share, self._expand) if key == "output" else (None, None)
            found = search_scale(
                stored.linears[key].weight.float(), magnitude, self._rounding, errors[key], share=share, expand=expand
            )
            scales[key] = found if expand is None else expand(found)
        return scales

    def _share(self, values: torch.Tensor) -> torch.Tensor:
        """Return for each row of v the mean over the inputs of the output projection that come from it."""
        config = self._config
        return values.view(config.num_kv_heads, -1, config.head_dim).mean(1).flatten()

    def _expand(self, values: torch.Tensor) -> torch.Tensor:
        """Return for each input of the output projection the value of the row of v that it comes from."""
        config = self._config
        by_head = values.view(config.num_kv_heads, 1, config.head_dim)
        return by_head.expand(-1, config.num_heads // config.num_kv_heads, -1).flatten()

    def _row_scale(self, key: LinearKey, scales: Mapping[LinearKey, torch.Tensor]) -> torch.Tensor | None:
        """Return what the rows of a linear are divided by because the linear after it is scaled, or None."""
        after = _ROWS_BEFORE.get(key)
        if after is None or after not in scales:
            return None
        scale = scales[after]
        if key == "qkv":
            scale = scale.view(self._config.num_kv_heads, -1, self._config.head_dim)[:, 0].flatten()
        others = self._plans[key].out_features - scale.shape[0]  # q and k, or gate: the scaled rows are the last
        return torch.cat((torch.ones(others, device=scale.device), scale))


_NORM_BEFORE: Mapping[str, LinearKey] = {"attention_norm": "qkv", "mlp_norm": "gate_up"}
_ROWS_BEFORE: Mapping[LinearKey, LinearKey] = {"qkv": "output", "gate_up": "down"}


def _scaled_norms(
    norms: Mapping[str, torch.Tensor], scales: Mapping[LinearKey, torch.Tensor]
) -> dict[str, torch.Tensor]:
    scaled = {name: norm.float() for name, norm in norms.items()}
    for name, key in _NORM_BEFORE.items():
        if key in scales:
            scaled[name] = scaled[name] / scales[key]
    return scaled


def _attention_error(layer: Layer, sample: LayerSample) -> Callable[[torch.Tensor], torch.Tensor]:
    inputs, bias = layer.norm("attention_norm", sample.beginnings), layer.linears["qkv"].bias

    def block(qkv: torch.Tensor) -> torch.Tensor:
        return layer.linears["output"](layer.attend(qkv, sample.rotary))

    return _block_error(inputs, layer.linears["qkv"].weight, bias, block)


def _mlp_error(layer: Layer, sample: LayerSample) -> Callable[[torch.Tensor], torch.Tensor]:
    def block(gate_up: torch.Tensor) -> torch.Tensor:
        return layer.linears["down"](layer.gate(gate_up))

    linear = layer.linears["gate_up"]
    return _block_error(sample.statistics["gate_up"].rows, linear.weight, linear.bias, block)


def _linear_error(layer: Layer, key: LinearKey, sample: LayerSample) -> Callable[[torch.Tensor], torch.Tensor]:
    return _block_error(sample.statistics[key].rows, layer.linears[key].weight, None, lambda outputs: outputs)


def _block_error(
    inputs: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    block: Callable[[torch.Tensor], torch.Tensor],
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the function that says how far a weight's block output is from the original's, squared and summed."""
    expected = block(functional.linear(inputs, weight, bias))

    def error_of(candidate: torch.Tensor) -> torch.Tensor:
        actual = block(functional.linear(inputs, candidate.to(inputs.dtype), bias))
        return (actual - expected).float().square().sum()

    return error_of


def _relative_error(
    weight: torch.Tensor, rounded: torch.Tensor, scale: torch.Tensor | None, inputs: InputStatistics | None
) -> float:
    """Return |rounded x - weight x| / |weight x| over the sample, or of the weights alone without one."""
    lost = rounded - weight
    if inputs is None:
        return float(lost.norm() / weight.norm().clamp(min=torch.finfo(torch.float32).tiny))
    rows = inputs.rows.float()
    rows = rows if scale is None else rows / scale
    outputs = functional.linear(rows, weight).norm()
    return float(functional.linear(rows, lost).norm() / outputs.clamp(min=torch.finfo(torch.float32).tiny))
