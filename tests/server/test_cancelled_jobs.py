"""A quantization that is cancelled in any of its phases, with the real worker on two layers of the demo model."""

import asyncio
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from admin_fakes import AdminServer, admin_server
from safetensors import safe_open
from safetensors.torch import save_file
from server_fakes import FakeEngine, chat_body

import lmdserve
from lmdserve.server.job_store import FOLDER_NAME
from lmdserve.server.model import ServedModel

DEMO = Path(lmdserve.__file__).parent / "demo" / "model"
HELD_WORKER = (sys.executable, str(Path(__file__).with_name("held_worker.py")))
ORDER = {"model": "model", "work_dir": "out", "calib_samples": 2, "calib_seqlen": 64, "eval_tokens": 128}
LATER_LAYER = re.compile(r"\.layers\.[2-9]\.")
WORKER_PHASES = ("read", "search", "write", "evaluate")


def write_two_layers(folder: Path) -> None:
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((DEMO / name).read_bytes())
    config = json.loads((DEMO / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    tensors = {}
    for path in DEMO.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys() if not LATER_LAYER.search(name)}  # noqa: SIM118
    save_file(tensors, folder / "model.safetensors")


async def until(condition: Any) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.02)


def exists(process_id: int) -> bool:
    return Path(f"/proc/{process_id}").exists()


async def cancel(server: AdminServer, job: Any) -> Any:
    status, state = await server.ask("DELETE", f"/admin/jobs/{job['id']}")
    assert (status, state["status"], state["error"]) == (200, "cancelled", None), state
    assert (await server.ask("POST", "/v1/chat/completions", chat_body()))[0] == 200
    return state


@pytest.mark.slow
async def test_a_job_can_be_cancelled_in_every_phase(
    engine: FakeEngine, model: ServedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing half-written is left, no process, and the next job of the same name is taken."""
    models_dir, held = tmp_path / "models", tmp_path / "held"
    models_dir.mkdir()
    write_two_layers(models_dir / "model")
    monkeypatch.setenv("HELD", str(held))
    async with admin_server(engine, model, models_dir, worker_command=HELD_WORKER) as server:
        for phase in WORKER_PHASES:
            monkeypatch.setenv("HOLD_IN", phase)
            _, job = await server.ask("POST", "/admin/quantize", ORDER)
            await until(held.exists)
            await until(held.read_text)
            process_id = int(held.read_text())
            assert exists(process_id)
            assert (models_dir / "out").exists() == (phase != "read")
            assert (await cancel(server, job))["phase"] == phase
            assert sorted(path.name for path in models_dir.iterdir()) == [FOLDER_NAME, "model"]
            assert not exists(process_id)
            held.unlink()
        await cancel_while_the_result_is_loaded(server, monkeypatch)


async def cancel_while_the_result_is_loaded(server: AdminServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is quantized by then is complete, and stays: it can be swapped to."""
    monkeypatch.delenv("HOLD_IN")
    server.loader.gate.clear()
    _, job = await server.ask("POST", "/admin/quantize", {**ORDER, "then": "swap"})
    async for state in server.events(job["id"]):
        if state["phase"] == "load":
            break
    cancelling = asyncio.create_task(cancel(server, job))
    await asyncio.sleep(0.05)
    server.loader.gate.set()  # what is being loaded cannot be interrupted, and is given back
    assert (await cancelling)["phase"] == "load"
    assert [engine.is_released for engine in server.loader.engines["out"]] == [True]
    assert (await server.order("/admin/models/swap", model="out", gate={"max_kl": 10}))["status"] == "done"
