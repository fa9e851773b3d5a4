"""The two attentions of the demo model's training agree, values and gradients: flash attention learns the truth."""

import pytest
import torch

from lmdserve.demo.network import packed_dense_attention, packed_flash_attention

pytestmark = pytest.mark.gpu


def test_flash_attention_equals_dense_attention_over_packed_documents() -> None:
    torch.manual_seed(0)
    lengths = [1, 63, 127, 300, 1000]
    num_tokens = sum(lengths)
    begins = torch.tensor([0, *lengths]).cumsum(0)
    starts = torch.cat([begins, torch.full((3,), num_tokens)]).int().cuda()  # padded, as batches are
    outputs, gradients = [], []
    for attention in (packed_flash_attention, packed_dense_attention):
        torch.manual_seed(1)
        states = [
            torch.randn(num_tokens, heads, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
            for heads in (6, 2, 2)
        ]
        output = attention(*states, starts, 1024)
        output.float().square().sum().backward()
        outputs.append(output.float())
        gradients.append([state.grad.float() for state in states])
    assert (outputs[0] - outputs[1]).norm() / outputs[1].norm() < 1e-2  # bf16 operands
    for flash, dense in zip(*gradients, strict=True):
        assert (flash - dense).norm() / dense.norm() < 2e-2
