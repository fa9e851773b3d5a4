"""Quantized checkpoints of every format through the fused engine: one model, one answer, whatever the format.

Models are random, with heads of 128, and small enough for a CPU to give the expected answers in float32.
"""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from engine_runs import Answer, common_prefix_share, greedy, make_requests, run_engine
from family_checkpoints import case_named
from packed_checkpoints import FORMATS, LinearSource, quantization_config, quantized_model, write_quantized

from lmdserve.engine.config import Device, Dtype, EngineConfig
from lmdserve.engine.memory_sizes import GATHERED_ROWS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SIZES = {"hidden_size": 512, "intermediate_size": 768, "max_position_embeddings": 4096}
NUM_TOKENS = 16
GROUP_SIZE = 128
IN_ORDER = ("awq", "awq-gemv", "gptq", "gptq-v2", "ct-asym")
REORDERED = ("gptq-act-order", "gptq-v2-act-order", "ct-group-order")
Write = Callable[..., Path]


@pytest.fixture(scope="module")
def write(tmp_path_factory: pytest.TempPathFactory) -> Write:
    def write_model(
        format_name: str, case_id: str = "qwen2", *, group_size: int = GROUP_SIZE, shares_orders: bool = True
    ) -> Path:
        case, form = case_named(case_id), FORMATS[format_name]
        source = LinearSource(form, group_size, shares_orders=shares_orders, gain=1.0)
        model, linears = quantized_model(case, source, **SIZES)
        folder = tmp_path_factory.mktemp(format_name)
        section = quantization_config(form, group_size)
        return write_quantized(folder, case, model, linears, form, section, torch_dtype="float16", **SIZES)

    return write_model


def prompts() -> list[list[int]]:
    """Return prompts of which one takes several turns of gathering; together they decode in a graph."""
    numbers = random.Random(3)
    return [[numbers.randrange(131) for _ in range(length)] for length in (GATHERED_ROWS + 300, 5, 1, 64, 200)]


def answers(folder: Path, device: Device = "cuda", dtype: Dtype = "float16", *, deterministic: bool) -> list[Answer]:
    config = EngineConfig(
        model=str(folder), device=device, dtype=dtype, cache_max_entry_count=128, session_len=3000, max_batch_size=8,
        deterministic=deterministic,
    )  # fmt: skip
    return run_engine(config, make_requests(prompts(), greedy(NUM_TOKENS, num_logprobs=2))).rounds[0]


@pytest.mark.parametrize("names", [IN_ORDER, REORDERED], ids=["in order", "reordered"])
def test_the_same_codes_give_the_same_bits_in_every_format(names: tuple[str, ...], write: Write) -> None:
    first, *others = (answers(write(name), deterministic=True) for name in names)
    assert len({tuple(answer.token_ids) for answer in first}) > 1
    for other in others:
        assert [(answer.token_ids, answer.logprobs) for answer in other] == [
            (answer.token_ids, answer.logprobs) for answer in first
        ]


@pytest.mark.parametrize(
    ("format_name", "case_id", "group_size", "shares_orders"),
    [
        ("awq-gemv", "qwen2", 128, True),
        ("ct-sym", "llama2", 128, True),
        ("gptq-act-order", "internlm2", 128, True),
        ("gptq-act-order", "qwen2", 32, True),
        ("ct-group-order", "llama2", 128, False),
        ("gptq-act-order", "llama2", 16, False),  # groups that the packed kernels do not take
    ],
)
def test_answers_are_the_cpus(
    format_name: str, case_id: str, group_size: int, shares_orders: bool, write: Write
) -> None:
    """The first token's logprobs are close, and a greedy answer turns at near ties only."""
    folder = write(format_name, case_id, group_size=group_size, shares_orders=shares_orders)
    expected = answers(folder, "cpu", "float32", deterministic=False)
    for deterministic in (False, True):
        ours = answers(folder, deterministic=deterministic)
        gaps = [abs(a.logprobs[0].logprob - b.logprobs[0].logprob) for a, b in zip(ours, expected, strict=True)]
        assert max(gaps) <= 0.02
        assert common_prefix_share(ours, expected) >= 0.8


def test_the_plain_decoder_reorders_too(write: Write) -> None:
    """float32 on a GPU dequantizes for each product; products of other shapes than the CPU's turn near ties at most."""
    folder = write("gptq-act-order", "qwen2", shares_orders=False)
    ours, expected = (answers(folder, device, "float32", deterministic=False) for device in ("cuda", "cpu"))
    assert common_prefix_share(ours, expected) >= 0.9
