"""What the engine's tests share: a tiny InternLM2 checkpoint with random weights, and a fake model that needs none.

The fake's next token is a hash of every token that its KV cache leads to, so that a wrong block table, slot, or reused
block changes the output. Neither is imitated from the code under test.
"""

import copy
import hashlib
import json
import threading
from array import array
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import save_file

from lmdserve.engine.api import EngineInfo
from lmdserve.engine.batch import StepBatch
from lmdserve.engine.blocks import BlockPool
from lmdserve.engine.config import EngineConfig
from lmdserve.engine.constraints import ConstraintState
from lmdserve.engine.kv_cache import KVCache
from lmdserve.engine.load_engine import load_engine
from lmdserve.engine.loader import load_model
from lmdserve.engine.loop import AsyncEngine
from lmdserve.engine.model_config import ModelConfig
from lmdserve.engine.runner import ComputedStep, Runner
from lmdserve.engine.scheduler import Scheduler
from lmdserve.engine.step import Chunk, ChunkResult

FAKE_VOCAB_SIZE = 64
FAKE_EOS = 63
TINY_CONFIG: dict[str, Any] = {
    "architectures": ["InternLM2ForCausalLM"],
    "model_type": "internlm2",
    "vocab_size": 199,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": {"type": "dynamic", "factor": 2.0},
    "bias": False,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}


@pytest.fixture(scope="session", autouse=True)
def _one_torch_thread() -> Iterator[None]:
    """Tiny matrices gain nothing from a second thread, and on a busy machine waiting for it costs milliseconds."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a 2-layer InternLM2 checkpoint whose greedy text is varied."""
    folder = tmp_path_factory.mktemp("tiny-internlm2")
    (folder / "config.json").write_text(json.dumps(TINY_CONFIG))
    save_file(_tiny_weights(), folder / "model.safetensors")
    return folder


def _tiny_weights() -> dict[str, torch.Tensor]:
    """Random weights, large enough that attention and MLP outweigh the embedding: the output depends on all tokens."""
    generator = torch.Generator().manual_seed(20240524)
    hidden, inner = TINY_CONFIG["hidden_size"], TINY_CONFIG["intermediate_size"]
    head_dim = hidden // TINY_CONFIG["num_attention_heads"]
    qkv_rows = (TINY_CONFIG["num_attention_heads"] + 2 * TINY_CONFIG["num_key_value_heads"]) * head_dim

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) * 2.0 / columns**0.5

    weights = {
        "model.tok_embeddings.weight": matrix(TINY_CONFIG["vocab_size"], hidden),
        "model.norm.weight": torch.ones(hidden),
        "output.weight": matrix(TINY_CONFIG["vocab_size"], hidden),
    }
    for layer in range(TINY_CONFIG["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        weights |= {
            f"{prefix}.attention_norm.weight": torch.ones(hidden),
            f"{prefix}.attention.wqkv.weight": matrix(qkv_rows, hidden),
            f"{prefix}.attention.wo.weight": matrix(hidden, hidden),
            f"{prefix}.ffn_norm.weight": torch.ones(hidden),
            f"{prefix}.feed_forward.w1.weight": matrix(inner, hidden),
            f"{prefix}.feed_forward.w3.weight": matrix(inner, hidden),
            f"{prefix}.feed_forward.w2.weight": matrix(hidden, inner),
        }
    return weights


class FakeModel:
    """A model whose KV cache is one number a slot: the token itself.

    `raises_on` and `nan_on` are tokens that break a step, or a row, when they are computed. Clearing `gate` holds every
    step until it is set again; `is_broken` makes all steps raise.
    """

    def __init__(self) -> None:
        self.raises_on: set[int] = set()
        self.nan_on: set[int] = set()
        self.is_broken = False
        self.gate = threading.Event()
        self.gate.set()
        self.num_steps = 0
        self.batch_sizes: list[int] = []

    @staticmethod
    def logits(context: Sequence[int]) -> torch.Tensor:
        """Return the logits after these tokens, fp32 [FAKE_VOCAB_SIZE]."""
        seed = int.from_bytes(hashlib.sha256(repr(list(context)).encode()).digest()[:6], "little")
        return torch.randn(FAKE_VOCAB_SIZE, generator=torch.Generator().manual_seed(seed)) * 2

    @classmethod
    def greedy(cls, prompt: Sequence[int], max_tokens: int) -> list[int]:
        """Return what greedy decoding gives, end-of-sequence token included."""
        token_ids = list(prompt)
        while len(token_ids) < len(prompt) + max_tokens:
            token_ids.append(int(cls.logits(token_ids).argmax()))
            if token_ids[-1] == FAKE_EOS:
                break
        return token_ids[len(prompt) :]

    def forward(self, batch: Any, kv_cache: torch.Tensor) -> torch.Tensor:
        self.gate.wait(30)
        self.num_steps += 1
        self.batch_sizes.append(len(batch.query_lens))
        if self.is_broken or self.raises_on & set(batch.token_ids.tolist()):
            raise RuntimeError("the fake model was told to raise")
        block_size = kv_cache.shape[1]
        kv_cache.view(-1)[batch.slot_ids] = batch.token_ids
        wanted = batch.logit_rows.tolist()
        rows = []
        first_row = 0
        for table, query_len, context_len in zip(batch.block_tables, batch.query_lens, batch.context_lens, strict=True):
            context = kv_cache[table].view(-1)[:context_len].tolist()
            assert len(table) * block_size >= context_len
            for row in range(first_row, first_row + query_len):
                if row in wanted:
                    past = context[: context_len - query_len + row - first_row + 1]
                    logits = self.logits(past)
                    rows.append(logits * torch.nan if self.nan_on & set(past) else logits)
            first_row += query_len
        return torch.stack(rows) if rows else torch.empty(0, FAKE_VOCAB_SIZE)


@dataclass
class StreamStep:
    """A step on its way through a StreamRunner."""

    chunks: Sequence[Chunk]
    computed: Future[ComputedStep]
    results: Future[list[ChunkResult]] | None = None


class StreamRunner:
    """A runner with two steps in flight, as on a GPU: what is launched runs later, in order, on a thread of its own.

    A step sees the host as it was at the launch, constraints as they were when it was sampled, and finds each
    sequence's last token by slot.
    """

    max_in_flight = 2
    device_busy_s = device_idle_s = 0.0

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._stream = ThreadPoolExecutor(1, thread_name_prefix="fake-device")
        self._last_token: dict[int, int] = {}

    def launch(self, chunks: Sequence[Chunk]) -> "StreamStep":
        snapshots = [chunk._replace(sequence=_snapshot(chunk.sequence)) for chunk in chunks]
        return StreamStep(chunks, self._stream.submit(self._compute, snapshots))

    def sample(self, step: "StreamStep") -> None:
        constraints = [copy.copy(chunk.sequence.constraint) for chunk in step.chunks]
        step.results = self._stream.submit(self._choose, step, constraints)

    def collect(self, step: "StreamStep") -> list[ChunkResult]:
        assert step.results is not None
        return step.results.result()

    def probe(self) -> None:
        self._stream.submit(self._runner.probe).result()

    def _compute(self, chunks: list[Chunk]) -> ComputedStep:
        for chunk in chunks:
            if chunk.start == chunk.sequence.num_tokens:
                chunk.sequence.token_ids.append(self._last_token[chunk.sequence.slot])
        return self._runner.launch(chunks)

    def _choose(self, step: "StreamStep", constraints: list[ConstraintState | None]) -> list[ChunkResult]:
        computed = step.computed.result()
        for chunk, constraint in zip(computed.chunks, constraints, strict=True):
            chunk.sequence.constraint = constraint
        self._runner.sample(computed)
        results = self._runner.collect(computed)
        for chunk, result in zip(computed.chunks, results, strict=True):
            if result.token_ids:
                self._last_token[chunk.sequence.slot] = result.token_ids[-1]
        return results


def _snapshot(sequence: Any) -> Any:
    snapshot = copy.copy(sequence)
    snapshot.token_ids = array("q", sequence.token_ids)
    snapshot.block_ids = array("q", sequence.block_ids)
    return snapshot


@pytest.fixture
def fake_model() -> FakeModel:
    return FakeModel()


@pytest.fixture(params=[1, 2], ids=["one at a time", "two in flight"])
def build_fake_engine(fake_model: FakeModel, request: pytest.FixtureRequest) -> Callable[..., AsyncEngine]:
    """Return a function that builds an engine, not yet started, over the fake model; in both ways of stepping."""

    def build(
        *,
        num_blocks: int = 64,
        block_size: int = 4,
        max_batch_size: int = 8,
        max_prefill_tokens: int = 16,
        max_queue_size: int = 100,
        enable_prefix_caching: bool = True,
        session_len: int = 64,
        step_limit_s: float = 30.0,
        **options: Any,
    ) -> AsyncEngine:
        pool = BlockPool(num_blocks=num_blocks, block_size=block_size)
        scheduler = Scheduler(
            pool,
            max_batch_size=max_batch_size,
            max_prefill_tokens=max_prefill_tokens,
            max_decode_rows=max_batch_size,
            enable_prefix_caching=enable_prefix_caching,
        )
        kv_cache: Any = torch.full((num_blocks + 1, block_size), -1)
        runner = Runner(fake_model, kv_cache, block_size=block_size, device=torch.device("cpu"))
        return AsyncEngine(
            runner if request.param == 1 else StreamRunner(runner),
            scheduler,
            pool,
            info=EngineInfo(vocab_size=FAKE_VOCAB_SIZE, session_len=session_len, eos_token_ids=frozenset({FAKE_EOS})),
            rope_base_for=lambda num_prompt_tokens: 10000.0,
            max_live_requests=max_batch_size + max_queue_size,
            step_limit_s=step_limit_s,
            **options,
        )

    return build


@pytest.fixture(scope="session")
def bare_greedy(tiny_checkpoint: Path) -> Callable[..., list[int]]:
    """Return the reference: greedy decoding by a plain loop over the model, one sequence, no engine."""
    config = ModelConfig.from_folder(tiny_checkpoint)
    cpu = torch.device("cpu")
    model = load_model(tiny_checkpoint, config, dtype=torch.float32, device=cpu)

    def generate(prompt: Sequence[int], max_tokens: int, quant_policy: Literal[0, 4, 8] = 0) -> list[int]:
        num_blocks = -(-(len(prompt) + max_tokens) // 8)
        kv_cache = KVCache(
            config, num_blocks=num_blocks, block_size=8, quant_policy=quant_policy, dtype=torch.float32, device=cpu
        )
        table = torch.arange(num_blocks)
        token_ids = list(prompt)
        num_computed = 0
        while len(token_ids) < len(prompt) + max_tokens:
            new = torch.arange(num_computed, len(token_ids))
            batch = StepBatch(
                token_ids=torch.tensor(token_ids[num_computed:]),
                positions=new,
                slot_ids=new,
                query_lens=(len(new),),
                context_lens=(len(token_ids),),
                block_tables=table.view(1, -1),
                rope_bases=(config.rope_base(len(prompt)),),
                logit_rows=torch.tensor([len(new) - 1]),
            )
            num_computed = len(token_ids)
            token_ids.append(int(model.forward(batch, kv_cache)[0].argmax()))
        return token_ids[len(prompt) :]

    return generate


@pytest.fixture
def run_tiny_engine(tiny_checkpoint: Path) -> Callable[..., Any]:
    """Return an async context manager: a started engine, on the tiny checkpoint unless told otherwise, checked and
    stopped at the end.
    """

    @asynccontextmanager
    async def run(*, num_blocks: int = 400, **options: Any) -> AsyncIterator[AsyncEngine]:
        options = {"model": str(tiny_checkpoint), "cache_block_seq_len": 8, "max_batch_size": 40} | options
        engine = load_engine(EngineConfig(device="cpu", cache_max_entry_count=float(num_blocks), **options))
        await engine.start()
        try:
            yield engine
            engine.check_health()
        finally:
            await engine.stop(0.0)
        engine._scheduler.check()
        assert engine.stats().num_used_blocks == 0

    return run
