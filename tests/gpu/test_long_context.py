"""Contexts of 32768 tokens on a CUDA device: the fused decoder in 16 bits against the plain one in float32."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engine_runs import Answer, benchmark_script, greedy, make_requests, run_engine

from lmdserve.engine.config import Dtype, EngineConfig, QuantPolicy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CONTEXT_LEN = 32768
NUM_TOKENS = 8


@pytest.fixture(scope="module", params=[64, 128], ids=["head_dim 64", "head_dim 128"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two layers whose context is long."""
    script = benchmark_script("random_model")
    heads = {"head_dim": request.param, "num_heads": 256 // request.param, "num_kv_heads": 128 // request.param}
    shape = replace(script.SHAPES["tiny"], **heads, max_position_embeddings=2 * CONTEXT_LEN)
    folder = tmp_path_factory.mktemp("long")
    script.write_model(shape, "fp16", folder)
    return folder


def answers(model: Path, quant_policy: QuantPolicy, dtype: Dtype) -> list[Answer]:
    """Return the answers to a long prompt and, beside it, two short ones."""
    config = EngineConfig(
        model=str(model),
        device="cuda",
        dtype=dtype,
        quant_policy=quant_policy,
        cache_max_entry_count=2 * CONTEXT_LEN // 64,
        max_batch_size=8,
    )
    generator = torch.Generator().manual_seed(2)
    lengths = (CONTEXT_LEN, 100, 1)
    prompts = [torch.randint(3, 500, (length,), generator=generator).tolist() for length in lengths]
    return run_engine(config, make_requests(prompts, greedy(NUM_TOKENS, num_logprobs=5))).rounds[0]


@pytest.mark.parametrize("quant_policy", [0, 8, 4])
def test_the_end_of_a_long_context_is_computed_as_in_float32(model: Path, quant_policy: QuantPolicy) -> None:
    """The first token's five best logprobs; a cache's rounding differs where values lie between two of its steps."""
    ours, expected = answers(model, quant_policy, "float16"), answers(model, quant_policy, "float32")
    for a, b in zip(ours, expected, strict=True):
        assert len(a.token_ids) == NUM_TOKENS
        known = dict(b.logprobs[0].top)
        gaps = [abs(logprob - known[token_id]) for token_id, logprob in a.logprobs[0].top if token_id in known]
        assert len(gaps) >= 4
        assert max(gaps) <= {0: 0.02, 8: 0.04, 4: 0.2}[quant_policy]
