"""The fused decoder gives the plain one's logits for every way that tokens can come: prefill, decode, mixed, drafts.

The plain decoder, whose logits are tested against transformers, runs in float32; the fused one in float16 on the GPU if
there is one, else interpreted, with products of plain torch.
"""

from pathlib import Path

import pytest
import torch
from cache_driver import CacheDriver
from family_checkpoints import VOCAB_SIZE, case_named, write_checkpoint
from fused_driver import FusedDriver, TorchLinearAssembly

from lmdserve.engine import loader
from lmdserve.engine.config import QuantPolicy
from lmdserve.engine.loader import load_model
from lmdserve.engine.model_config import ModelConfig
from lmdserve.engine.models.fused_decoder import FusedDecoder

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZES = {
    "hidden_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 192,
    "head_dim": 64,
}
# float16 has 11 bits; a code of a quantized cache that falls on the other side of a half moves a value by a step.
TOLERANCE = {0: 6e-3, 8: 3e-2, 4: 2e-1}


@pytest.fixture
def folder(case_id: str, tmp_path: Path) -> Path:
    """Write a tiny checkpoint with heads of 64, of weights small enough that rounding errors do not grow by layers."""
    case = case_named(case_id)
    tensors = case.tensors(case.reference_model(**SIZES))
    scaled = {name: tensor if "norm" in name else tensor * 0.4 for name, tensor in tensors.items()}
    write_checkpoint(tmp_path, case.config_json(**SIZES), scaled)
    return tmp_path


def fused_decoder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> FusedDecoder:
    monkeypatch.setattr(loader, "choose_assembly", lambda *_: TorchLinearAssembly())
    model = load_model(folder, ModelConfig.from_folder(folder), dtype=torch.float16, device=DEVICE)
    assert isinstance(model, FusedDecoder)
    return model


def plain_logits(folder: Path, tokens: list[int], policy: QuantPolicy) -> torch.Tensor:
    config = ModelConfig.from_folder(folder)
    decoder = load_model(folder, config, dtype=torch.float32, device=torch.device("cpu"))
    return CacheDriver(decoder, quant_policy=policy).run("all", tokens, [len(tokens)])


def random_tokens(count: int, seed: int) -> list[int]:
    return torch.randint(VOCAB_SIZE, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def assert_close(ours: torch.Tensor, expected: torch.Tensor, policy: QuantPolicy) -> None:
    """Compare each token's logits with the norm of the expected ones; nothing is close to a wrong token's."""
    errors = (ours.cpu() - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert errors.max() <= TOLERANCE[policy], errors


@pytest.mark.parametrize(
    ("case_id", "policy"),
    [("internlm2", 0), ("internlm2", 8), ("internlm2", 4), ("qwen2", 0), ("qwen3", 8), ("mistral-window", 4)],
)
def test_chunks_and_decode_rows_give_the_plain_decoders_logits(
    folder: Path, policy: QuantPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two sequences: one prefilled in two chunks, the second beside the other's decode rows; then both decode."""
    first, second = random_tokens(40, 1), random_tokens(30, 2)
    expected = {"a": plain_logits(folder, first, policy), "b": plain_logits(folder, second, policy)}
    driver = FusedDriver(fused_decoder(folder, monkeypatch), quant_policy=policy)
    driver.add("a", len(first))
    driver.add("b", len(second))
    parts = {"a": [], "b": []}
    steps = [
        ({"a": first[:21]}, 0),
        ({"a": first[21:38]}, 0),
        ({"a": first[38:39], "b": second[:29]}, 1),
        ({"b": second[29:], "a": first[39:]}, 2),
    ]
    for work, num_decoding in steps:
        for name, logits in driver.step(work, num_decoding=num_decoding).items():
            parts[name].append(logits)
    for name, logits in parts.items():
        assert_close(torch.cat(logits), expected[name], policy)


@pytest.mark.parametrize("case_id", ["qwen3"])
def test_drafts_of_one_sequence_see_each_other(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of one sequence in one step; those after a wrong draft are forgotten and their places written again."""
    tokens, wrong = random_tokens(36, 3), random_tokens(3, 4)
    expected = plain_logits(folder, tokens, 8)
    driver = FusedDriver(fused_decoder(folder, monkeypatch), quant_policy=8)
    driver.add("a", len(tokens))
    driver.step({"a": tokens[:30]})
    driver.step({"a": [tokens[30], *wrong]}, num_decoding=1, has_drafts=True)
    driver.rewind("a", 3)
    logits = driver.step({"a": tokens[31:]}, num_decoding=1, has_drafts=True)["a"]
    assert_close(logits, expected[31:], 8)


@pytest.mark.parametrize("case_id", ["internlm2"])
def test_a_deterministic_tokens_bits_do_not_depend_on_chunks_or_neighbours(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything is prefill then; TorchLinear computes each row on its own."""
    tokens, others = random_tokens(37, 5), random_tokens(50, 6)
    model = fused_decoder(folder, monkeypatch)
    whole, pieces = FusedDriver(model, quant_policy=4), FusedDriver(model, quant_policy=4)
    for driver in (whole, pieces):
        driver.add("a", len(tokens))
        driver.add("b", len(others))
    expected = whole.step({"a": tokens}, is_deterministic=True)["a"]
    steps = [{"b": others[:20], "a": tokens[:5]}, {"a": tokens[5:36]}, {"b": others[20:], "a": tokens[36:]}]
    logits = torch.cat([pieces.step(work, is_deterministic=True)["a"] for work in steps])
    assert torch.equal(logits, expected)
