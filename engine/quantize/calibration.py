"""The calibration text on its way through the model: what each layer is searched on, and on to the next layer.

Owns the choice of what is sampled, the same for every layer. A layer sees the text as the 16-bit model before it leaves
it, so one forward pass of each layer is all there is.
"""

from collections.abc import Callable

import torch

from ..api import ConfigError
from ..model_config import ModelConfig
from .architectures import LinearKey
from .awq import LayerSample
from .hidden_states import HiddenStates
from .layer import Layer, Rotary
from .statistics import LayerStatistics

# Rows of inputs that candidates are compared on, and how many of them make the beginning of a window.
_SAMPLED_ROWS = {"cuda": 8192, "cpu": 2048}
_BEGINNING_TOKENS = 512


class Calibration:
    """All windows of the text before one layer."""

    def __init__(
        self,
        config: ModelConfig,
        states: HiddenStates,
        in_features: dict[LinearKey, int],
        *,
        group_size: int | None,
        dtype: torch.dtype,
        device: torch.device,
        seed: int,
    ) -> None:
        """`group_size` None: no ranges will be searched."""
        self._states = states
        self._in_features = in_features
        self._group_size = group_size
        self._device = device
        num_rows = _SAMPLED_ROWS[device.type]
        self._beginning = min(_BEGINNING_TOKENS, states.seqlen)
        self._num_beginnings = max(1, num_rows // self._beginning)
        self._rotary = Rotary(config, states.seqlen, dtype, device)
        self._beginning_rotary = Rotary(config, self._beginning, dtype, device)
        generator = torch.Generator().manual_seed(seed)
        per_batch = -(-num_rows // states.num_batches)
        self._positions = [
            torch.randperm(count, generator=generator)[:per_batch].sort().values.to(device)
            for count in states.batch_rows()
        ]

    def pass_layer(self, layer: Layer, on_share_done: Callable[[float], None]) -> tuple[LayerSample, float]:
        """Compute the layer; return what it is searched on, and the largest activation.

        ConfigError when activations are not finite: no checkpoint whose weights are right does that.
        """
        beginnings = self._states.beginnings(self._num_beginnings, self._beginning)
        statistics = LayerStatistics(
            self._in_features, group_size=self._group_size, sampled_positions=self._positions, device=self._device
        )
        largest = torch.zeros((), device=self._device)
        for index, batch in enumerate(self._states.batches()):
            after = layer.forward(batch, self._rotary, statistics)
            largest = torch.maximum(largest, after.abs().amax().float())
            self._states.replace(index, after)
            on_share_done((index + 1) / self._states.num_batches)
        largest_seen = max(float(largest), *(inputs.largest for inputs in statistics.inputs.values()))
        if not largest_seen < torch.finfo(torch.bfloat16).max:  # false for NaN
            raise ConfigError("activations are not finite; the weights are broken, or do not belong to config.json")
        return LayerSample(statistics.inputs, beginnings, self._beginning_rotary), largest_seen

    def skip_layer(self, layer: Layer) -> None:
        """Compute a layer that was quantized before."""
        for index, batch in enumerate(self._states.batches()):
            self._states.replace(index, layer.forward(batch, self._rotary))
