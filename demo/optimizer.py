"""Muon for the matrices, AdamW for the rest, with one learning rate for both.

Muon (Jordan et al. 2024): momentum, then an approximate orthogonalisation by five Newton-Schulz steps; the update is
scaled to AdamW's usual size, 0.2 * sqrt(longer side) (Liu et al. 2025, "Muon is scalable for LLM training"). Matrices
of one shape are stepped together, as the work is many small products.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalised(matrices: Tensor, steps: int = 5) -> Tensor:
    """Return [n, rows, columns] with all singular values near 1."""
    a, b, c = NEWTON_SCHULZ
    wide = matrices.bfloat16()
    tall = wide.shape[1] > wide.shape[2]
    if tall:
        wide = wide.mT
    wide = wide / (wide.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = wide @ wide.mT
        wide = a * wide + (b * gram + c * gram @ gram) @ wide
    result: Tensor = wide.mT if tall else wide
    return result


class Muon:
    """Steps groups of equal matrices."""

    def __init__(self, matrices: Iterable[nn.Parameter], momentum: float, weight_decay: float) -> None:
        groups: dict[tuple[int, ...], list[nn.Parameter]] = defaultdict(list)
        for matrix in matrices:
            groups[tuple(matrix.shape)].append(matrix)
        self.groups = list(groups.values())
        self.buffers = [torch.zeros(len(group), *group[0].shape, device=group[0].device) for group in self.groups]
        self.momentum, self.weight_decay = momentum, weight_decay

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        for group, buffer in zip(self.groups, self.buffers, strict=True):
            gradient = torch.stack([_gradient(matrix) for matrix in group])
            buffer.lerp_(gradient, 1 - self.momentum)
            update = orthogonalised(gradient.lerp(buffer, self.momentum)).float()
            scale = 0.2 * max(group[0].shape) ** 0.5
            for matrix, change in zip(group, update, strict=True):
                matrix.mul_(1 - learning_rate * self.weight_decay).sub_(change, alpha=learning_rate * scale)


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


class Optimizer:
    """Both optimizers over all parameters of a network."""

    def __init__(self, network: nn.Module, *, momentum: float = 0.95, weight_decay: float = 0.1) -> None:
        layers = [
            parameter
            for name, parameter in network.named_parameters()
            if name.startswith("layers.") and parameter.dim() == 2
        ]
        matrices = {id(parameter) for parameter in layers}
        others = [parameter for parameter in network.parameters() if id(parameter) not in matrices]
        self.muon = Muon(layers, momentum, weight_decay)
        self.adam = torch.optim.AdamW(others, lr=0.0, betas=(0.9, 0.95), weight_decay=0.01, fused=others[0].is_cuda)

    def step(self, learning_rate: float) -> None:
        """Update every parameter and drop the gradients."""
        self.muon.step(learning_rate)
        for group in self.adam.param_groups:
            group["lr"] = learning_rate
        self.adam.step()
        for matrices in self.muon.groups:
            for matrix in matrices:
                matrix.grad = None
        self.adam.zero_grad(set_to_none=True)
