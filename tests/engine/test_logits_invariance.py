"""In float32 on a CPU a token's logits are the same bits whatever shares its step, however its prompt was cut.

Everything that must not change an answer rests on this: batching, chunked prefill, preemption, prefix reuse.
"""

import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cache_driver import CacheDriver
from family_checkpoints import write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st

from lmdserve.engine import linear
from lmdserve.engine.config import QuantPolicy
from lmdserve.engine.loader import load_model
from lmdserve.engine.model_config import ModelConfig
from lmdserve.engine.models.decoder import Decoder
from lmdserve.kernels import reference

VOCAB_SIZE = 97
POLICIES: tuple[QuantPolicy, ...] = (0, 8, 4)
# (heads, key-value heads, head_dim, hidden, intermediate): the demo model's shape, then one key-value head, no groups,
# groups of three with sizes that no vector register divides, and groups wider than a tile.
SHAPES = {
    "demo": (4, 2, 64, 256, 768),
    "one-kv-head": (2, 1, 16, 32, 48),
    "no-groups": (3, 3, 8, 24, 40),
    "odd": (6, 2, 10, 36, 57),
    "wide-groups": (12, 1, 16, 64, 96),
}


def build(folder: Path, shape: tuple[int, ...], **config: Any) -> Decoder:
    num_heads, num_kv_heads, head_dim, hidden, intermediate = shape
    generator = torch.Generator().manual_seed(3)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) * 2 / columns**0.5

    num_q, num_kv = num_heads * head_dim, num_kv_heads * head_dim
    tensors = {
        "model.embed_tokens.weight": matrix(VOCAB_SIZE, hidden),
        "lm_head.weight": matrix(VOCAB_SIZE, hidden),
        "model.norm.weight": torch.rand(hidden, generator=generator) + 0.5,
    }
    for layer in range(2):
        for name, rows, columns in (
            ("self_attn.q_proj", num_q, hidden),
            ("self_attn.k_proj", num_kv, hidden),
            ("self_attn.v_proj", num_kv, hidden),
            ("self_attn.o_proj", hidden, num_q),
            ("mlp.gate_proj", intermediate, hidden),
            ("mlp.up_proj", intermediate, hidden),
            ("mlp.down_proj", hidden, intermediate),
        ):
            tensors[f"model.layers.{layer}.{name}.weight"] = matrix(rows, columns)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{name}.weight"] = torch.rand(hidden, generator=generator) + 0.5
    keys: dict[str, Any] = {
        "model_type": "llama",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": 2,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e4,
        **config,
    }
    write_checkpoint(folder, keys, tensors)
    return load_model(folder, ModelConfig.from_folder(folder), dtype=torch.float32, device=torch.device("cpu"))


def random_prompts(lengths: list[int], seed: int = 0) -> dict[str, list[int]]:
    source = random.Random(seed)
    return {f"s{index}": [source.randrange(VOCAB_SIZE) for _ in range(n)] for index, n in enumerate(lengths)}


def alone(decoder: Decoder, policy: QuantPolicy, prompts: dict[str, list[int]], block_size: int) -> dict[str, Any]:
    return {
        name: CacheDriver(decoder, block_size=block_size, quant_policy=policy).run(name, tokens, [len(tokens)])
        for name, tokens in prompts.items()
    }


def run_schedule(
    driver: CacheDriver, prompts: dict[str, list[int]], schedule: Iterator[dict[str, int]]
) -> dict[str, torch.Tensor]:
    """Run all prompts to their ends; each entry of `schedule` says how many tokens each sequence brings to a step."""
    done = dict.fromkeys(prompts, 0)
    logits: dict[str, list[torch.Tensor]] = {name: [] for name in prompts}
    for name, tokens in prompts.items():
        driver.add(name, len(tokens))
    while any(done[name] < len(tokens) for name, tokens in prompts.items()):
        work = {}
        for name, count in next(schedule).items():
            chunk = prompts[name][done[name] : done[name] + count]
            if chunk:
                work[name] = chunk
                done[name] += len(chunk)
        if work:
            for name, rows in driver.step(work).items():
                logits[name].append(rows)
    return {name: torch.cat(parts) for name, parts in logits.items()}


def random_schedule(names: list[str], seed: int) -> Iterator[dict[str, int]]:
    source = random.Random(seed)
    while True:
        chosen = source.sample(names, source.randint(1, len(names)))
        yield {name: source.choice([1, 1, 1, 2, 3, 8, 9, 17, 64]) for name in chosen}


def assert_same_bits(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, rows in expected.items():
        assert torch.equal(actual[name], rows), f"{name}: {(actual[name] != rows).any(1).nonzero().flatten().tolist()}"


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("shape", SHAPES)
def test_any_schedule_gives_the_bits_of_a_lone_prefill(shape: str, policy: QuantPolicy, tmp_path: Path) -> None:
    decoder = build(tmp_path, SHAPES[shape])
    prompts = random_prompts([70, 1, 33, 16, 50, 2, 100])
    expected = alone(decoder, policy, prompts, block_size=16)
    for seed in range(3):
        driver = CacheDriver(decoder, block_size=16, quant_policy=policy)
        assert_same_bits(run_schedule(driver, prompts, random_schedule(list(prompts), seed)), expected)


@pytest.mark.parametrize("policy", POLICIES)
def test_decoding_among_32_gives_the_bits_of_decoding_alone(policy: QuantPolicy, tmp_path: Path) -> None:
    decoder = build(tmp_path, SHAPES["demo"])
    prompts = random_prompts([5 + 7 * index for index in range(32)])
    driver = CacheDriver(decoder, block_size=64, quant_policy=policy)
    for name, tokens in prompts.items():
        driver.add(name, len(tokens))
    driver.step({name: tokens[:-3] for name, tokens in prompts.items()})
    together = [driver.step({name: [tokens[at]] for name, tokens in prompts.items()}) for at in (-3, -2, -1)]
    for name in ("s0", "s9", "s31"):
        lone = CacheDriver(decoder, block_size=64, quant_policy=policy).run(name, prompts[name], [1])
        assert torch.equal(torch.cat([step[name] for step in together]), lone[-3:])


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_random_batches(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    decoder = build(tmp_path_factory.mktemp("odd"), SHAPES[data.draw(st.sampled_from(["odd", "one-kv-head"]))])
    policy = data.draw(st.sampled_from(POLICIES))
    block_size = data.draw(st.sampled_from([1, 4, 7, 32]))
    prompts = random_prompts(
        data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=5)), data.draw(st.integers(0, 99))
    )
    expected = alone(decoder, policy, prompts, block_size)
    driver = CacheDriver(decoder, block_size=block_size, num_blocks=256, quant_policy=policy)
    schedule = random_schedule(list(prompts), data.draw(st.integers(0, 99)))
    assert_same_bits(run_schedule(driver, prompts, schedule), expected)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_prefix_computed_by_another_sequence_changes_nothing(policy: QuantPolicy, tmp_path: Path) -> None:
    decoder = build(tmp_path, SHAPES["demo"])
    first, second = random_prompts([90, 80]).values()
    second[:64] = first[:64]
    cold = CacheDriver(decoder, block_size=16, quant_policy=policy).run("cold", second, [80])
    driver = CacheDriver(decoder, block_size=16, quant_policy=policy)
    driver.run("first", first, [40, 1])
    driver.add("warm", len(second), shared_blocks=driver.blocks("first")[:4], num_shared=64)
    assert torch.equal(driver.step({"warm": second[64:]})["warm"], cold[64:])


@pytest.mark.parametrize("policy", POLICIES)
def test_stale_blocks_change_nothing(policy: QuantPolicy, tmp_path: Path) -> None:
    """Blocks are not cleared between owners, and an owner may have overflowed to infinity or NaN."""
    decoder = build(tmp_path, SHAPES["demo"])
    tokens = random_prompts([70])["s0"]
    fresh = CacheDriver(decoder, block_size=16, quant_policy=policy).run("fresh", tokens, [30, 1])
    driver = CacheDriver(decoder, block_size=16, num_blocks=12, quant_policy=policy)
    for layer in range(decoder.config.num_layers):
        heads = torch.full((12 * 16, 2 * 2, 64), float("nan"))
        heads[::2] = float("inf")
        heads[::3] = -float("inf")
        append_everywhere(driver, layer, heads)
    assert torch.equal(driver.run("stale", tokens, [30, 1]), fresh)


def append_everywhere(driver: CacheDriver, layer: int, heads: torch.Tensor) -> None:
    data, scales = driver.kv_cache.layer(layer)
    rows = torch.arange(data.shape[:-1].numel())
    reference.append_kv(heads, data, scales, rows, driver.kv_cache.bits)


@pytest.fixture
def _two_threads() -> Iterator[None]:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(num_threads)


@pytest.mark.usefixtures("_two_threads")
def test_threads_keep_the_bits_too(tmp_path: Path) -> None:
    decoder = build(tmp_path, SHAPES["demo"])
    prompts = random_prompts([70, 3, 130])
    expected = alone(decoder, 0, prompts, block_size=64)
    driver = CacheDriver(decoder, block_size=64)
    assert_same_bits(run_schedule(driver, prompts, random_schedule(list(prompts), 1)), expected)


def test_a_sliding_window_keeps_the_bits_too(tmp_path: Path) -> None:
    decoder = build(tmp_path, SHAPES["demo"], model_type="mistral", sliding_window=21)
    prompts = random_prompts([70, 3, 50])
    expected = alone(decoder, 0, prompts, block_size=16)
    driver = CacheDriver(decoder, block_size=16)
    assert_same_bits(run_schedule(driver, prompts, random_schedule(list(prompts), 1)), expected)


def test_more_slices_than_one_keep_the_bits(tmp_path: Path) -> None:
    """A long prompt beside many short ones is computed in many slices of several tiles; alone they fall differently."""
    decoder = build(tmp_path, SHAPES["demo"])
    prompts = random_prompts([1200, *range(40, 72)])
    expected = alone(decoder, 0, prompts, block_size=64)
    driver = CacheDriver(decoder, block_size=64, num_blocks=256)
    schedule = itertools.repeat(dict.fromkeys(prompts, 500))
    assert_same_bits(run_schedule(driver, prompts, schedule), expected)


def test_the_fallback_without_onednn_keeps_the_bits_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = alone(build(tmp_path, SHAPES["demo"]), 0, random_prompts([20]), block_size=16)["s0"]
    monkeypatch.setattr(linear, "_has_onednn", lambda dtype: False)
    decoder = build(tmp_path, SHAPES["demo"])
    prompts = random_prompts([20, 7, 33])
    lone = alone(decoder, 0, prompts, block_size=16)
    assert (lone["s0"] - expected).abs().max() < 1e-4
    driver = CacheDriver(decoder, block_size=16)
    assert_same_bits(run_schedule(driver, prompts, random_schedule(list(prompts), 5)), lone)
