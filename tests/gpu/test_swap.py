"""A swap on a CUDA device, of a whole server in this process: streams go on, and memory comes back.

Kernels compute each row apart (`deterministic`), so an answer has to be, character for character, what its weights
answer alone, whatever was swapped or computed beside it.
"""

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal, NamedTuple

import aiohttp
import pytest
import torch
from admin_fakes import AdminServer
from engine_runs import DEMO, benchmark_script
from streamed_answer import streamed_answer

from lmdserve.engine.config import EngineConfig
from lmdserve.server.app import build, listening
from lmdserve.server.config import ServerConfig
from lmdserve.server.loading import EngineLoader
from lmdserve.server.services import SERVICES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

NUM_CLIENTS = 8
NUM_TOKENS = 64
MIB = 2**20
# Two engines that live at once have a stream each, and one was loaded on another thread: cuBLAS keeps 32 MiB for each
# thread and stream that it knows.
CUBLAS_BYTES = 80 * MIB


@pytest.fixture(scope="module")
def models_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model in 16 bits and in 4."""
    folder = tmp_path_factory.mktemp("models")
    shutil.copytree(DEMO, folder / "fp16")
    benchmark_script("demo_quality").write_awq(DEMO, folder / "awq")
    return folder


@asynccontextmanager
async def server_of(models_dir: Path, model: str) -> AsyncIterator[AdminServer]:
    engine_config = EngineConfig(
        model=str(models_dir / model), dtype="float16", quant_policy=8, cache_max_entry_count=512, session_len=1024,
        max_batch_size=64, deterministic=True,
    )  # fmt: skip
    config = ServerConfig(server_port=0, admin=True, models_dir=str(models_dir))
    loader = EngineLoader(engine_config, config)
    app = build(*loader.load_first(), config, loader=loader)
    async with listening(app, config) as url, aiohttp.ClientSession() as session:
        yield AdminServer(url, session, app, loader)
    for serving in app[SERVICES].servings.live:
        serving.engine.release()


async def answer(server: AdminServer, index: int) -> str:
    return await streamed_answer(server.session, server.url, index, max_tokens=NUM_TOKENS)


async def answers(server: AdminServer) -> list[str]:
    return [await answer(server, index) for index in range(NUM_CLIENTS)]


class Alone(NamedTuple):
    """A checkpoint in a server that knows no others."""

    answers: list[str]  # one question at a time
    num_bytes: int


async def serve_alone(models_dir: Path, model: str) -> Alone:
    torch._C._cuda_clearCublasWorkspaces()
    before_bytes = torch.cuda.memory_allocated()
    async with server_of(models_dir, model) as server:
        said = await answers(server)
        return Alone(said, torch.cuda.memory_allocated() - before_bytes)


@pytest.fixture(scope="module")
def alone(models_dir: Path) -> dict[str, Alone]:
    return {model: asyncio.run(serve_alone(models_dir, model)) for model in ("fp16", "awq")}


@pytest.mark.parametrize("how", ["beside", "drain"])
def test_streams_go_on_through_a_swap_and_back(
    models_dir: Path, alone: dict[str, Alone], how: Literal["beside", "drain"]
) -> None:
    asyncio.run(swap_and_roll_back(models_dir, how, fp16=alone["fp16"], awq=alone["awq"]))


async def swap_and_roll_back(models_dir: Path, how: Literal["beside", "drain"], *, fp16: Alone, awq: Alone) -> None:
    streamed: list[tuple[int, str]] = []
    is_over = asyncio.Event()

    async def stream_on(server: AdminServer, index: int) -> None:
        while not is_over.is_set():
            streamed.append((index, await answer(server, index)))

    torch._C._cuda_clearCublasWorkspaces()
    before_bytes = torch.cuda.memory_allocated()
    async with server_of(models_dir, "fp16") as server, asyncio.TaskGroup() as streams:
        for index in range(NUM_CLIENTS):
            streams.create_task(stream_on(server, index))
        await asyncio.sleep(0.5)
        taken = [await there_and_back(server, how, fp16=fp16, awq=awq) for _ in range(3)]
        is_over.set()
    for there_bytes, back_bytes in taken:
        assert there_bytes - before_bytes == pytest.approx(awq.num_bytes, abs=CUBLAS_BYTES)
        assert back_bytes - before_bytes == pytest.approx(fp16.num_bytes, abs=CUBLAS_BYTES)
    assert taken[2] == pytest.approx(taken[1], abs=MIB), "swapping on and on takes no more"
    assert [text for index, text in streamed if text not in (fp16.answers[index], awq.answers[index])] == []
    assert any(text == awq.answers[index] != fp16.answers[index] for index, text in streamed)
    torch._C._cuda_clearCublasWorkspaces()
    assert torch.cuda.memory_allocated() - before_bytes < MIB


async def there_and_back(
    server: AdminServer, how: Literal["beside", "drain"], *, fp16: Alone, awq: Alone
) -> tuple[int, int]:
    """Swap to the 4-bit weights and roll back; return the bytes that torch holds after each."""
    job = await server.order("/admin/models/swap", model="awq", how=how)
    assert (job["status"], job["plan"]["how"]) == ("done", how), job["error"]
    assert await answers(server) == awq.answers
    there_bytes = torch.cuda.memory_allocated()
    _, models = await server.ask("GET", "/admin/models")
    assert sum(models["current"]["planned_bytes"].values()) == job["plan"]["after_bytes"]
    job = await server.order("/admin/models/rollback", how=how)
    assert job["status"] == "done", job["error"]
    assert await answers(server) == fp16.answers
    return there_bytes, torch.cuda.memory_allocated()
