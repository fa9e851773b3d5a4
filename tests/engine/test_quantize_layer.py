"""The quantizer's own forward pass, a layer at a time, against transformers' models of every family."""

from pathlib import Path

import pytest
import torch
from family_checkpoints import FAMILY_CASES, VOCAB_SIZE, FamilyCase, write_checkpoint

from lmdserve.engine.quantize.hidden_states import HiddenStates
from lmdserve.engine.quantize.layer import Layer, Rotary
from lmdserve.engine.quantize.source import SourceModel
from lmdserve.kernels import reference

CPU = torch.device("cpu")
TOLERANCE = 1e-4  # of logits of order 1, in float32


@pytest.mark.parametrize("case", FAMILY_CASES, ids=lambda case: case.id)
@torch.no_grad()
def test_layers_compute_what_transformers_computes(case: FamilyCase, tmp_path: Path) -> None:
    model = case.reference_model()
    source = SourceModel(write_checkpoint(tmp_path, case.config_json(), case.tensors(model)))
    windows = torch.randint(VOCAB_SIZE, (3, 75), generator=torch.Generator().manual_seed(7))
    states = HiddenStates(windows, source.embedding(), batch_size=2, device=CPU)
    rotary = Rotary(source.config, 75, torch.float32, CPU)
    for index in range(source.config.num_layers):
        layer = Layer(source.config, source.layer(index, CPU))
        for number, batch in enumerate(states.batches()):
            states.replace(number, layer.forward(batch, rotary))
    norm, head = source.final_norm_and_head()
    hidden = torch.cat(list(states.batches()))
    logits = reference.rms_norm(hidden, norm, source.config.rms_norm_eps) @ head.t()
    assert (logits - model(windows).logits).abs().max() <= TOLERANCE
    beginnings = states.beginnings(2, 10)
    assert torch.equal(beginnings, hidden[[0, 2], :10]), "windows spread over the text"
