"""Quantizing as a job: its worker, its progress, its end in every way, and what a killed server leaves behind."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from admin_fakes import AdminServer, FakeLoader, admin_server, quantizing, report
from server_fakes import FakeEngine

from lmdserve.server.job_store import FOLDER_NAME
from lmdserve.server.model import ServedModel

QUANTIZE = "/admin/quantize"
SEARCH = {"phase": "search", "layer": 3, "num_layers": 8, "percent": 40.0, "seconds_left": 12.5}


@pytest.fixture
async def server(engine: FakeEngine, model: ServedModel, tmp_path: Path) -> AsyncIterator[AdminServer]:
    async with admin_server(engine, model, tmp_path) as server:
        yield server


async def until(condition: Any) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


def is_alive(process_id: int) -> bool:
    try:
        return Path(f"/proc/{process_id}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def left_behind(server: AdminServer) -> list[str]:
    """Return what lies in the models' folder beside checkpoints and notes."""
    return sorted(path.name for path in server.models_dir.iterdir() if path.name not in ("model", FOLDER_NAME))


async def test_a_job_from_order_to_end(server: AdminServer) -> None:
    go = server.models_dir / "model" / "go"
    server.model(
        "model", quantizing(["say", SEARCH], ["print", "no JSON"], ["complain", "a warning"], ["wait", str(go)])
    )
    options = {"calib_samples": 8, "w_group_size": -1, "search_clip": False, "dtype": "bfloat16"}
    async with server.session.post(
        server.url + QUANTIZE, json={"model": "model", "work_dir": "out", **options}
    ) as reply:
        job = await reply.json()
        assert (reply.status, reply.headers["Location"]) == (202, f"/admin/jobs/{job['id']}")
    assert (job["kind"], job["status"], job["model"], job["work_dir"]) == ("quantize", "running", "model", "out")
    states = server.events(job["id"])
    async for state in states:
        if state["phase"] == "search":
            break
    assert {key: state[key] for key in SEARCH} == SEARCH
    late = server.events(job["id"])
    assert await anext(late) == state  # a late reader gets the present state first
    assert (await server.ask("GET", "/admin/jobs"))[1]["data"] == [state]
    go.touch()
    rest = [state async for state in states]
    assert (rest[-1]["status"], rest[-1]["phase"], rest[-1]["percent"]) == ("done", "done", 100.0)
    assert [state async for state in late][-1] == rest[-1]
    assert [state async for state in server.events(job["id"])] == [rest[-1]]
    ((_, *arguments),) = server.attempts("model")
    assert arguments == [
        f"--work-dir={server.models_dir / 'out'}", "--calib-samples=8", "--w-group-size=-1", "--no-search-clip",
        "--dtype=bfloat16", "--resume", "--progress=json",
    ]  # fmt: skip
    assert (server.models_dir / "out" / "config.json").exists()


async def test_the_served_checkpoint_is_what_is_quantized_by_default(
    engine: FakeEngine, model_folder: Path, tmp_path: Path, model: ServedModel
) -> None:
    (model_folder / "worker.json").write_text(json.dumps(quantizing()))
    try:
        async with admin_server(engine, model, tmp_path) as server:
            job = await server.order(QUANTIZE, work_dir="out")
            assert (job["status"], job["model"]) == ("done", model.checkpoint)
    finally:
        (model_folder / "worker.json").unlink()
        (model_folder / "attempts").unlink()


async def test_one_job_at_a_time(server: AdminServer) -> None:
    server.model("model", quantizing(["wait", str(server.models_dir / "go")]))
    _, job = await server.ask("POST", QUANTIZE, {"model": "model", "work_dir": "out"})
    status, reply = await server.ask("POST", QUANTIZE, {"model": "model", "work_dir": "out2"})
    assert (status, reply["error"]["code"]) == (409, "conflict")
    assert job["id"] in reply["error"]["message"]
    (server.models_dir / "go").touch()
    assert (await server.finished(job["id"]))["status"] == "done"
    assert (await server.order(QUANTIZE, model="model", work_dir="out2"))["status"] == "done"


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([["say", {"phase": "error", "message": "the text has 7 tokens"}], ["exit", 2]], "the text has 7 tokens"),
        ([["say", SEARCH], ["say", {"phase": "error", "message": "NaN in x.weight"}], ["exit", 2]], "NaN in x.weight"),
        ([["complain", "Traceback"], ["complain", "MemoryError"], ["exit", 1]],
         "the worker process ended with status 1; its last words: Traceback / MemoryError"),
        ([["say", SEARCH], ["kill"]], "the worker process was killed by SIGKILL; its last words: none"),
        ([["say", SEARCH]], "the worker process ended with status 0; its last words: none"),
    ],
)  # fmt: skip
async def test_a_worker_that_fails_leaves_a_message_and_nothing_else(
    server: AdminServer, steps: list[Any], message: str
) -> None:
    server.model("model", [["write", "half", "written"], *steps])
    job = await server.order(QUANTIZE, model="model", work_dir="out", then="swap")
    assert (job["status"], job["error"]) == ("failed", {"code": "quantization_failed", "message": message})
    assert left_behind(server) == []


@pytest.mark.parametrize("steps", [[], [["say", SEARCH]], [["say", SEARCH], ["ignore_sigterm"]]], ids=len)
async def test_cancelling_ends_the_worker_and_leaves_nothing(
    server: AdminServer, steps: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lmdserve.server.worker_process.STOP_TIMEOUT_S", 0.2)
    server.model("model", [["write", "half", "written"], *steps, ["write", "more", ""], ["wait", "/nowhere"]])
    _, job = await server.ask("POST", QUANTIZE, {"model": "model", "work_dir": "out"})
    await until(lambda: (server.models_dir / "out" / "more").exists())
    status, state = await server.ask("DELETE", f"/admin/jobs/{job['id']}")
    assert (status, state["status"], state["error"]) == (200, "cancelled", None)
    assert left_behind(server) == []
    ((process_id, *_),) = server.attempts("model")
    assert not is_alive(process_id)
    assert (await server.ask("DELETE", f"/admin/jobs/{job['id']}"))[0] == 409


async def test_then_swap(server: AdminServer) -> None:
    server.model("model", quantizing(["write", "report.json", report(kl=0.02, increase=0.01)]))
    job = await server.order(QUANTIZE, model="model", work_dir="out", then="swap", gate={"max_kl": 0.03})
    assert (job["status"], job["quality"]["kl_divergence"], job["plan"]["how"]) == ("done", 0.02, "beside")
    card = (await server.ask("GET", "/v1/models"))[1]["data"][0]
    assert (card["id"], card["checkpoint"]["name"]) == ("toy", "out")
    assert (await server.order("/admin/models/rollback"))["status"] == "done"


async def test_a_gate_that_fails_keeps_the_checkpoint_and_the_old_weights(server: AdminServer) -> None:
    server.model("model", quantizing(["write", "report.json", report(kl=0.02, increase=0.01)]))
    job = await server.order(QUANTIZE, model="model", work_dir="out", then="swap", gate={"max_kl": 0.01})
    assert (job["status"], job["error"]["code"]) == ("failed", "gate_failed")
    assert "KL divergence is 0.02 and may be 0.01" in job["error"]["message"]
    assert (server.models_dir / "out" / "config.json").exists()
    assert server.loader.engines == {}


async def test_then_swap_waits_for_a_swap_that_is_under_way(server: AdminServer) -> None:
    server.model("model", quantizing())
    server.model("other")
    server.loader.gate.clear()
    _, swap = await server.ask("POST", "/admin/models/swap", {"model": "other"})
    _, job = await server.ask("POST", QUANTIZE, {"model": "model", "work_dir": "out", "then": "swap"})
    await until(lambda: (server.models_dir / "out" / "config.json").exists())
    server.loader.gate.set()
    assert (await server.finished(swap["id"]))["status"] == "done"
    assert (await server.finished(job["id"]))["status"] == "done"
    assert list(server.loader.engines) == ["other", "out"]


async def test_a_job_that_waits_for_a_swap_can_be_cancelled(server: AdminServer) -> None:
    """Whatever point the other's swap has reached; what was quantized is complete and stays."""
    server.model("model", quantizing())
    server.model("other")
    server.loader.gate.clear()
    _, swap = await server.ask("POST", "/admin/models/swap", {"model": "other"})
    server.services.admin.swapper.can_cancel = False  # type: ignore[union-attr]
    _, job = await server.ask("POST", QUANTIZE, {"model": "model", "work_dir": "out", "then": "swap"})
    await until((server.models_dir / "out" / "generation_config.json").exists)
    await until(lambda: server.services.admin.board.find(job["id"]).is_quantized)  # type: ignore[union-attr]
    status, state = await server.ask("DELETE", f"/admin/jobs/{job['id']}")
    assert (status, state["status"]) == (200, "cancelled")
    server.loader.gate.set()
    assert (await server.finished(swap["id"]))["status"] == "done"
    assert (server.models_dir / "out" / "config.json").exists()


async def test_a_server_that_stops_ends_the_worker_and_the_next_one_resumes(
    engine: FakeEngine, model: ServedModel, tmp_path: Path
) -> None:
    async with admin_server(engine, model, tmp_path) as server:
        server.model("model", quantizing(["write", "state", "half"], ["wait", str(tmp_path / "go")]))
        _, job = await server.ask("POST", QUANTIZE, {"model": "model", "work_dir": "out", "then": "swap"})
        await until(lambda: (tmp_path / "out" / "state").exists())
    ((process_id, *_),) = server.attempts("model")
    assert not is_alive(process_id)
    assert (tmp_path / "out" / "state").read_text() == "half"
    (tmp_path / "go").touch()
    async with admin_server(FakeEngine(), model, tmp_path) as server:
        state = await server.finished(job["id"])
        assert (state["status"], state["created"]) == ("done", job["created"])
        assert len(server.attempts("model")) == 2
        assert (await server.ask("GET", "/v1/models"))[1]["data"][0]["checkpoint"]["name"] == "out"
    async with admin_server(FakeEngine(), model, tmp_path) as server:
        assert (await server.ask("GET", f"/admin/jobs/{job['id']}"))[1] == state
        assert len(server.attempts("model")) == 2


async def test_a_swap_that_a_server_did_not_finish_is_said_to_have_failed(
    engine: FakeEngine, model: ServedModel, tmp_path: Path
) -> None:
    loader = FakeLoader(model.folder)
    loader.gate.clear()
    async with admin_server(engine, model, tmp_path, loader) as server:
        server.model("new")
        _, job = await server.ask("POST", "/admin/models/swap", {"model": "new"})
        loader.gate.set()
        note = tmp_path / FOLDER_NAME / f"{job['id']}.json"
        text = note.read_text()
        assert (await server.finished(job["id"]))["status"] == "done"
    note.write_text(text)  # as a server that was killed leaves it
    async with admin_server(FakeEngine(), model, tmp_path) as server:
        state = (await server.ask("GET", f"/admin/jobs/{job['id']}"))[1]
        assert (state["status"], state["error"]["code"]) == ("failed", "interrupted")


async def test_notes_that_cannot_be_read_are_left_alone(server: AdminServer, model: ServedModel) -> None:
    (server.models_dir / FOLDER_NAME / "job-x.json").write_text("{")
    async with admin_server(FakeEngine(), model, server.models_dir) as other:
        assert (await other.ask("GET", "/admin/jobs"))[1] == {"object": "list", "data": []}
    assert (server.models_dir / FOLDER_NAME / "job-x.json").exists()


async def test_two_servers_do_not_run_the_same_jobs(server: AdminServer, model: ServedModel) -> None:
    server.model("model", quantizing(["wait", str(server.models_dir / "go")]))
    await server.ask("POST", QUANTIZE, {"model": "model", "work_dir": "out"})
    async with admin_server(FakeEngine(), model, server.models_dir) as other:
        assert (await other.ask("GET", "/admin/jobs"))[1]["data"] == []
        status, reply = await other.ask("POST", QUANTIZE, {"model": "model", "work_dir": "out2"})
        assert status == 409
        assert "another server runs the jobs" in reply["error"]["message"]
    await until((server.models_dir / "model" / "attempts").exists)
    assert len(server.attempts("model")) == 1


async def test_a_disk_that_takes_no_note_takes_no_job(server: AdminServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.model("model", quantizing())

    def full(descriptor: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("os.fsync", full)
    status, reply = await server.ask("POST", QUANTIZE, {"model": "model", "work_dir": "out"})
    assert (status, reply["error"]["code"]) == (507, "insufficient_storage")
    assert "No space left on device" in reply["error"]["message"]
    assert [path.name for path in (server.models_dir / FOLDER_NAME).iterdir()] == ["lock"]
    assert left_behind(server) == []


async def test_a_gpu_that_serving_leaves_little_of_is_refused(server: AdminServer) -> None:
    server.model("model", quantizing())
    order = {"model": "model", "work_dir": "out"}
    server.loader.spare_bytes = 4 * 2**30
    status, reply = await server.ask("POST", QUANTIZE, order)
    assert status == 409
    assert "leaves 4.0 GiB of the GPU, and quantizing model takes about 5.0 GiB" in reply["error"]["message"]
    assert "skip_evaluation" in reply["error"]["message"]
    assert (await server.order(QUANTIZE, **order, skip_evaluation=True))["status"] == "done"
    server.loader.spare_bytes = 3 * 2**30
    status, reply = await server.ask("POST", QUANTIZE, {**order, "work_dir": "out2", "skip_evaluation": True})
    assert status == 409
    assert "skip_evaluation" not in reply["error"]["message"]
    assert (await server.order(QUANTIZE, model="model", work_dir="out2", device="cpu"))["status"] == "done"


async def test_a_worker_is_told_how_much_of_the_gpu_it_may_take(server: AdminServer) -> None:
    server.loader.spare_bytes = 20 * 2**30
    server.model("model", quantizing())
    assert (await server.order(QUANTIZE, model="model", work_dir="out"))["status"] == "done"
    ((_, *arguments),) = server.attempts("model")
    assert arguments[:2] == ["--gpu-bytes", str(20 * 2**30)]


def test_a_worker_dies_with_its_server_and_yields_to_it(tmp_path: Path) -> None:
    """The real worker's beginning, with what it would run replaced by a report of what it is."""
    program = (
        "import os, sys, time\n"
        "from lmdserve.server import cli, job_worker\n"
        "def run(arguments):\n"
        "    print(os.getpid(), os.nice(0), *arguments, flush=True)\n"
        "    time.sleep(60)\n"
        "cli.main = run\n"
        "job_worker.main(sys.argv[1:])\n"
    )
    parent = (
        "import os, subprocess, sys, time\n"
        f"subprocess.Popen([sys.executable, '-c', {program!r}, str(os.getpid()), 'folder', '--resume'])\n"
        "time.sleep(60)\n"
    )
    server = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    process_id, niceness, *arguments = server.stdout.readline().split()
    assert (niceness, arguments) == ("19", ["quantize", "folder", "--resume"])
    server.send_signal(signal.SIGKILL)
    server.communicate()
    for _ in range(200):
        if not is_alive(int(process_id)):
            return
        signal.sigtimedwait([], 0.02)
    raise AssertionError("the worker outlived its server")
