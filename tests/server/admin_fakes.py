"""A server that takes orders: fake engines for every checkpoint, a scripted worker, and a client that gives orders."""

import json
import sys
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal

import aiohttp
from aiohttp import web
from server_fakes import FakeEngine
from toy_models import TOY_MODELS

from lmdserve.engine.api import ConfigError, EngineInfo, SwapPlan
from lmdserve.server.app import build, listening
from lmdserve.server.config import ServerConfig
from lmdserve.server.model import ServedModel, load_served_model
from lmdserve.server.services import SERVICES

FAKE_WORKER = (sys.executable, str(Path(__file__).with_name("fake_worker.py")))
CONFIG_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")


class FakeLoader:
    """Gives a FakeEngine for every folder; what it does is set by its attributes."""

    def __init__(self, demo_folder: Path) -> None:
        self.demo_folder = demo_folder
        self.how: Literal["beside", "drain"] = "beside"
        self.engines: dict[str, list[FakeEngine]] = {}  # by checkpoint, in the order of loading
        self.make_engine: Callable[[str], FakeEngine] = lambda checkpoint: FakeEngine()
        self.gate = threading.Event()  # loading waits for it
        self.gate.set()
        self.failures: dict[str, Exception] = {}
        self.plan_failure: ConfigError | None = None
        self.spare_bytes: int | None = None
        self.needed_bytes = 5 * 2**30  # to quantize; one less without an evaluation

    def plan(self, folder: Path, running: EngineInfo, *, may_load_beside: bool) -> SwapPlan:
        if self.plan_failure is not None:
            raise self.plan_failure
        how = self.how if may_load_beside else "drain"
        return SwapPlan(how, "so the test says", 3_000_000_000, 5_000_000_000, 2_000_000_000, 1000, 2000, 4096)

    def load(self, folder: Path, *, checkpoint: str) -> tuple[FakeEngine, ServedModel]:
        assert self.gate.wait(10)
        if checkpoint in self.failures:
            raise self.failures[checkpoint]
        engine = self.make_engine(checkpoint)
        self.engines.setdefault(checkpoint, []).append(engine)
        return engine, load_served_model(folder, name="toy", chat_template=None, checkpoint=checkpoint)

    def spare_gpu_bytes(self, running: EngineInfo) -> int | None:
        return self.spare_bytes

    def quantizing_gpu_bytes(self, folder: Path, *, has_evaluation: bool) -> int:
        return self.needed_bytes - (not has_evaluation) * 2**30


class AdminServer:
    """A running server with its parts at hand, and orders as methods."""

    def __init__(self, url: str, session: aiohttp.ClientSession, app: web.Application, loader: FakeLoader) -> None:
        self.url = url
        self.session = session
        self.app = app
        self.services = services = app[SERVICES]
        self.loader = loader
        assert services.config.models_dir is not None
        self.models_dir = Path(services.config.models_dir)

    async def ask(self, method: str, path: str, body: Any = None, **options: Any) -> tuple[int, Any]:
        async with self.session.request(method, self.url + path, json=body, **options) as reply:
            return reply.status, await reply.json()

    async def events(self, job_id: str) -> AsyncIterator[Any]:
        async with self.session.get(f"{self.url}/admin/jobs/{job_id}/events") as reply:
            assert reply.status == 200
            assert reply.content_type == "text/event-stream"
            async for line in reply.content:
                if line.startswith(b"data: "):
                    yield json.loads(line[6:])

    async def finished(self, job_id: str) -> Any:
        """Return the job once it is over."""
        state = None
        async for event in self.events(job_id):
            state = event
        assert state is not None
        assert state["status"] != "running"
        return state

    async def order(self, path: str, **fields: Any) -> Any:
        """Give an order that is taken, and return its job once that is over."""
        status, job = await self.ask("POST", path, fields)
        assert status == 202, job
        return await self.finished(job["id"])

    def model(self, name: str, steps: list[Any] | None = None, *, kind: str = "internlm2") -> Path:
        """Write a checkpoint without weights into the models' folder, and what quantizing it does."""
        folder = self.models_dir / name
        folder.mkdir(parents=True)
        TOY_MODELS[kind].write(folder)
        if steps is not None:
            (folder / "worker.json").write_text(json.dumps(steps))
        return folder

    def attempts(self, name: str) -> list[list[Any]]:
        """Return process id and arguments of each worker that ran for a model."""
        return [json.loads(line) for line in (self.models_dir / name / "attempts").read_text().splitlines()]


def quantizing(*steps: list[Any]) -> list[Any]:
    """Return the steps of a worker that succeeds, with `steps` before it writes."""
    copies = [["copy", name] for name in CONFIG_FILES]
    return [["say", {"phase": "read"}], *steps, *copies, ["say", {"phase": "done", "output": "x", "report": "y"}]]


def report(*, kl: float | None, increase: float | None, kv_bits: int = 16) -> str:
    """Return a report.json with these numbers."""
    row = {"weights": "4-bit", "kv_bits": kv_bits, "perplexity": 7.5, "perplexity_increase": increase,
           "kl_divergence": kl, "top1_agreement": 0.97}  # fmt: skip
    exact = row | {"weights": "16-bit", "perplexity_increase": 0.0, "kl_divergence": 0.0, "top1_agreement": 1.0}
    return json.dumps({
        "source": "a", "output": "b", "created": "2026-11-21T00:00:00Z",
        "format": {"method": "awq", "bits": 4, "group_size": 128, "symmetric": False},
        "size_bytes": {"before": 4, "after": 1}, "layers": [],
        "quality": {"text": "builtin", "num_tokens": 100, "rows": [exact, row]},
        "time_s": {}, "peak_memory_bytes": {"device": 0, "host": 0},
    })  # fmt: skip


@asynccontextmanager
async def admin_server(
    engine: FakeEngine,
    model: ServedModel,
    models_dir: Path,
    loader: FakeLoader | None = None,
    *,
    worker_command: Sequence[str] = FAKE_WORKER,
    **options: Any,
) -> AsyncIterator[AdminServer]:
    """Serve, with orders open to this machine unless `options` say otherwise."""
    options = {"admin": True, "models_dir": str(models_dir)} | options
    config = ServerConfig(server_port=0, **options)
    loader = loader or FakeLoader(model.folder)
    app = build(engine, model, config, loader=loader, worker_command=worker_command)
    async with listening(app, config) as url, aiohttp.ClientSession() as session:
        yield AdminServer(url, session, app, loader)
