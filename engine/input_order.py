"""Weights quantized in the order of activations: which group each input is in, and the order that makes groups runs.

GPTQ with desc_act, and compressed-tensors with actorder "group", quantize the inputs with the largest activations
first, so a scale group is any set of inputs. The kernels want runs of neighbours: a weight's inputs are sorted by group
once at load, and activations are gathered in the same order before each product, or were made in it already.
"""

import torch


def group_index_complaint(group_index: torch.Tensor, group_size: int, *, may_reorder: bool) -> str | None:
    """Say, as the end of a sentence about the tensor, what is wrong with the groups of the inputs, [in_features]."""
    index = group_index.cpu().long()
    in_order = torch.arange(len(index)) // group_size
    if torch.equal(index, in_order) or (not may_reorder and bool((index == -1).all())):  # -1: left as allocated
        return None
    if not may_reorder:
        return (
            "has inputs of a group apart from each other, and quantization_config says that they are neighbours; "
            "it needs desc_act true (GPTQ) or actorder group (compressed-tensors)"
        )
    if not torch.equal(index.sort().values, in_order):
        return f"does not put {group_size} inputs into each of {len(index) // group_size} groups; download it again"
    return None


def input_order(group_index: torch.Tensor) -> torch.Tensor | None:
    """Return the order, int64 [in_features], in which inputs are sorted by group; None when they are so already."""
    index = group_index.long()
    if bool((index[1:] >= index[:-1]).all()):
        return None
    return index.argsort(stable=True)
