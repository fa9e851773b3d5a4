"""One checkpoint takes another's place: no request fails or changes hands, and what goes wrong changes nothing."""

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from admin_fakes import AdminServer, FakeLoader, admin_server, report
from server_fakes import FakeEngine, answer, chat_body

from lmdserve.engine.api import ConfigError, EngineError
from lmdserve.server.model import ServedModel
from lmdserve.server.serving import Serving, Servings, make_serving

CHAT, SWAP, ROLLBACK = "/v1/chat/completions", "/admin/models/swap", "/admin/models/rollback"


def engine_saying(text: str, pause_s: float | None = None) -> FakeEngine:
    engine = FakeEngine()
    engine.script = lambda request: answer(text, pause_s=None if request.uid.startswith("warm-up") else pause_s)
    return engine


@pytest.fixture
async def server(model: ServedModel, tmp_path: Path) -> AsyncIterator[AdminServer]:
    """The checkpoint at start says "old", every other one its own name."""
    loader = FakeLoader(model.folder)
    loader.make_engine = engine_saying
    async with admin_server(engine_saying("old"), model, tmp_path, loader) as server:
        server.model("new")
        server.model("newer", kind="qwen without tools")
        yield server


async def said(server: AdminServer) -> str:
    status, reply = await server.ask("POST", CHAT, chat_body())
    assert status == 200, reply
    return str(reply["choices"][0]["message"]["content"])


async def card(server: AdminServer) -> Any:
    return (await server.ask("GET", "/v1/models"))[1]["data"][0]


async def until(condition: Any) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.002)


def first_engine(server: AdminServer) -> FakeEngine:
    return server.services.servings.live[0].engine  # type: ignore[return-value]


@pytest.mark.parametrize("how", ["beside", "drain"])
async def test_there_and_back(server: AdminServer, how: Any) -> None:
    server.loader.how = how
    old = first_engine(server)
    assert (await card(server))["checkpoint"] == {"name": server.services.servings.current.model.folder.name,
                                                  "format": "hf"}  # fmt: skip
    job = await server.order(SWAP, model="new")
    assert (job["status"], job["kind"], job["plan"]["how"], job["plan"]["peak_bytes"]) == (
        "done", "swap", how, 5_000_000_000,
    )  # fmt: skip
    assert await said(server) == "new"
    shown = await card(server)
    assert (shown["id"], shown["checkpoint"]["name"]) == ("toy", "new")
    assert old.is_released
    (new,) = server.loader.engines["new"]
    assert len(server.services.servings.live) == 1
    job = await server.order(ROLLBACK)
    assert (job["status"], job["kind"]) == ("done", "rollback")
    assert new.is_released
    assert (await card(server))["checkpoint"]["name"] == old_name(server)
    status, reply = await server.ask("POST", ROLLBACK)
    assert (status, reply["error"]["code"]) == (409, "conflict")
    assert "no way back" in reply["error"]["message"]


def old_name(server: AdminServer) -> str:
    return next(name for name in server.loader.engines if name not in ("new", "newer"))


async def test_rollbacks_go_back_one_by_one(server: AdminServer) -> None:
    for name in ("new", "newer"):
        await server.order(SWAP, model=name)
    assert (await server.ask("GET", "/admin/models"))[1]["previous"]["checkpoint"] == "new"
    await server.order(ROLLBACK)
    assert await said(server) == "new"
    await server.order(ROLLBACK)
    assert (await card(server))["checkpoint"]["name"] == old_name(server)
    assert (await server.ask("GET", "/admin/models"))[1]["previous"] is None


async def test_running_requests_finish_on_the_old_weights(model: ServedModel, tmp_path: Path) -> None:
    """Streams begun before the switch keep engine, tokenizer and template; those after it get the new ones at once."""
    old = engine_saying("all of the old answer", pause_s=0.1)
    async with admin_server(old, model, tmp_path) as server:
        server.model("new", kind="qwen without tools")
        server.loader.make_engine = engine_saying
        running = [asyncio.create_task(said(server)) for _ in range(5)]
        await until(lambda: len(old.live) == 5)
        status, job = await server.ask("POST", SWAP, {"model": "new"})
        assert status == 202
        (new,) = await loaded(server, "new")
        await until(lambda: server.services.servings.current.engine is new)
        # The new template has other control tokens; the fake engine says bytes, which both tokenizers share.
        assert (await server.ask("POST", "/v1/chat/render", chat_body()))[1]["prompt"].startswith("<|im_start|>user")
        status, models = await server.ask("GET", "/admin/models")
        assert models["finishing"] == [{"checkpoint": model.checkpoint, "folder": str(model.folder), "requests": 5}]
        assert (await server.ask("GET", f"/admin/jobs/{job['id']}"))[1]["phase"] == "finish_running"
        assert not old.is_released
        assert await asyncio.gather(*running) == ["all of the old answer"] * 5
        assert (await server.finished(job["id"]))["status"] == "done"
        assert old.is_released
        assert old.aborted == []


async def loaded(server: AdminServer, checkpoint: str) -> list[FakeEngine]:
    await until(lambda: server.loader.engines.get(checkpoint))
    return server.loader.engines[checkpoint]


async def test_draining_holds_new_requests_back_until_the_new_weights_serve(model: ServedModel, tmp_path: Path) -> None:
    old = engine_saying("old answer", pause_s=0.03)
    async with admin_server(old, model, tmp_path) as server:
        server.model("new")
        server.loader.make_engine = engine_saying
        server.loader.how = "drain"
        server.loader.gate.clear()
        running = asyncio.create_task(said(server))
        await until(lambda: old.live)
        _, job = await server.ask("POST", SWAP, {"model": "new"})
        await asyncio.sleep(0.05)
        waiting = [asyncio.create_task(said(server)) for _ in range(4)]
        assert await running == "old answer"
        await until(lambda: old.is_released)
        await asyncio.sleep(0.05)
        assert not any(task.done() for task in waiting)
        assert server.services.servings.stats().num_waiting == 4
        assert (await server.ask("GET", "/health"))[0] == 200
        server.loader.gate.set()
        assert await asyncio.gather(*waiting) == ["new"] * 4
        assert (await server.finished(job["id"]))["status"] == "done"
        assert len(old.requests) == 1


async def test_draining_that_takes_too_long_is_given_up(model: ServedModel, tmp_path: Path) -> None:
    """Nothing is cut off: the running request ends as it would have, and the old weights serve who waited."""
    old = engine_saying("old answer", pause_s=0.05)
    async with admin_server(old, model, tmp_path) as server:
        server.model("new")
        server.loader.how = "drain"
        running = asyncio.create_task(said(server))
        await until(lambda: old.live)
        _, job = await server.ask("POST", SWAP, {"model": "new", "drain_timeout": 0.05})
        await asyncio.sleep(0.02)
        assert await said(server) == "old answer"
        state = await server.finished(job["id"])
        assert (state["status"], state["error"]["code"]) == ("failed", "swap_failed")
        assert "1 requests were still running after 0.05 s" in state["error"]["message"]
        assert await running == "old answer"
        assert server.loader.engines == {}


async def test_who_wakes_up_late_does_not_get_weights_that_are_about_to_go(model: ServedModel) -> None:
    """Its bug: one swap let a request in, and the next began before the request had taken its lease."""
    servings = Servings(make_serving(FakeEngine(), model, ThreadPoolExecutor(1)))
    servings.hold_back()

    async def lease() -> Serving:
        async with servings.lease() as serving:
            return serving

    waiting = asyncio.create_task(lease())
    await asyncio.sleep(0.01)
    servings.resume()
    servings.hold_back()
    await asyncio.sleep(0.01)
    assert not waiting.done()
    servings.resume()
    assert await waiting is servings.current


def engine_raising(error: Exception) -> FakeEngine:
    """An engine that fails in the warm-up."""
    engine = FakeEngine()
    engine.script = lambda request: [error]
    return engine


@pytest.mark.parametrize("how", ["beside", "drain"])
@pytest.mark.parametrize(
    ("load_error", "warm_up_error", "expected"),
    [
        (ConfigError("lacks 3 tensors"), None, "new could not be loaded: lacks 3 tensors"),
        (RuntimeError("oops"), None, "new could not be loaded (RuntimeError: oops)"),
        (None, EngineError("the logits are not finite"), "new cannot compute: the logits are not finite"),
        (None, RuntimeError("oops"), "new cannot compute (RuntimeError: oops)"),
    ],
)
async def test_a_checkpoint_that_does_not_work_changes_nothing(
    server: AdminServer, how: Any, load_error: Exception | None, warm_up_error: Exception | None, expected: str
) -> None:
    server.loader.how = how

    def make_engine(checkpoint: str) -> FakeEngine:
        if checkpoint == "new" and warm_up_error is not None:
            return engine_raising(warm_up_error)
        return engine_saying("old again")

    server.loader.make_engine = make_engine
    if load_error is not None:
        server.loader.failures["new"] = load_error
    job = await server.order(SWAP, model="new")
    assert (job["status"], job["error"]["code"]) == ("failed", "swap_failed")
    assert expected in job["error"]["message"]
    assert await said(server) == ("old" if how == "beside" else "old again")
    assert all(engine.is_released for engine in server.loader.engines.get("new", []))
    assert (await server.ask("POST", ROLLBACK))[0] == 409
    assert len(server.services.servings.live) == 1


async def test_when_neither_can_be_loaded_the_server_says_that_it_is_dead(server: AdminServer) -> None:
    server.loader.how = "drain"
    server.loader.failures = {"new": ConfigError("no"), old_folder_name(server): ConfigError("no either")}
    job = await server.order(SWAP, model="new")
    assert job["status"] == "failed"
    status, reply = await server.ask("POST", CHAT, chat_body())
    assert status == 503
    assert "neither the new checkpoint nor the old one" in reply["error"]["message"]
    assert (await server.ask("GET", "/health"))[0] == 503
    server.loader.failures = {}
    assert (await server.order(SWAP, model="new"))["status"] == "done"  # an order can still help
    assert await said(server) == "new"
    assert (await server.ask("GET", "/health"))[0] == 200


def old_folder_name(server: AdminServer) -> str:
    return server.services.servings.current.model.checkpoint


async def test_one_swap_at_a_time(server: AdminServer) -> None:
    server.loader.gate.clear()
    _, job = await server.ask("POST", SWAP, {"model": "new"})
    for path, body in ((SWAP, {"model": "newer"}), (SWAP, {"model": "new"})):
        status, reply = await server.ask("POST", path, body)
        assert (status, reply["error"]["code"]) == (409, "conflict")
        assert "under way" in reply["error"]["message"]
    server.loader.gate.set()
    assert (await server.finished(job["id"]))["status"] == "done"
    status, reply = await server.ask("POST", SWAP, {"model": "new"})
    assert (status, reply["error"]["message"]) == (409, "model: 'new' serves already")


async def test_a_swap_is_cancelled_before_the_switch_and_not_after(model: ServedModel, tmp_path: Path) -> None:
    old = engine_saying("a long old answer", pause_s=0.12)
    async with admin_server(old, model, tmp_path) as server:
        server.model("new")
        server.loader.make_engine = engine_saying
        server.loader.gate.clear()
        _, job = await server.ask("POST", SWAP, {"model": "new"})
        cancelling = asyncio.create_task(server.ask("DELETE", f"/admin/jobs/{job['id']}"))
        await asyncio.sleep(0.02)
        server.loader.gate.set()
        status, state = await cancelling
        assert (status, state["status"]) == (200, "cancelled")
        assert [engine.is_released for engine in server.loader.engines["new"]] == [True]
        running = asyncio.create_task(said(server))
        await until(lambda: old.live)
        _, job = await server.ask("POST", SWAP, {"model": "new"})
        await until(lambda: server.services.servings.current.model.checkpoint == "new")
        status, reply = await server.ask("DELETE", f"/admin/jobs/{job['id']}")
        assert (status, reply["error"]["code"]) == (409, "conflict")
        assert "rollback" in reply["error"]["message"]
        assert await running == "a long old answer"
        assert (await server.finished(job["id"]))["status"] == "done"
        status, reply = await server.ask("DELETE", f"/admin/jobs/{job['id']}")
        assert (status, reply["error"]["message"]) == (409, f"job {job['id']} is done already")


async def test_the_plan_comes_before_the_swap(server: AdminServer) -> None:
    status, reply = await server.ask("POST", SWAP, {"model": "new", "dry_run": True})
    assert status == 200
    assert reply["plan"] == {
        "how": "beside", "reason": "so the test says", "running_bytes": 3_000_000_000, "peak_bytes": 5_000_000_000,
        "after_bytes": 2_000_000_000, "running_kv_tokens": 1000, "after_kv_tokens": 2000, "session_len": 4096,
    }  # fmt: skip
    assert reply["quality"] is None
    assert server.loader.engines == {}
    status, reply = await server.ask("POST", SWAP, {"model": "new", "dry_run": True, "how": "drain"})
    assert reply["plan"]["how"] == "drain"
    server.loader.how = "drain"
    status, reply = await server.ask("POST", SWAP, {"model": "new", "how": "beside"})
    assert status == 409
    assert "cannot be loaded beside the running one" in reply["error"]["message"]
    server.loader.plan_failure = ConfigError("the model needs 20.00 GiB and 10.00 GiB may be taken")
    status, reply = await server.ask("POST", SWAP, {"model": "new"})
    assert (status, reply["error"]["param"]) == (400, "model")
    assert "needs 20.00 GiB" in reply["error"]["message"]


@pytest.mark.parametrize(
    ("gate", "numbers", "status", "words"),
    [
        ({"max_kl": 0.03, "max_ppl_increase": 0.02}, {"kl": 0.02, "increase": 0.01}, 202, []),
        ({"max_kl": 0.01}, {"kl": 0.02, "increase": 0.01}, 409, ["KL divergence is 0.02 and may be 0.01"]),
        ({"max_ppl_increase": 0.005}, {"kl": 0.02, "increase": 0.0123}, 409, ["perplexity is 0.0123 and may be 0.005"]),
        ({"max_kl": 1}, {"kl": None, "increase": None}, 409, ["KL divergence is not finite"]),
        ({"max_kl": 1}, {"kl": 0.1, "increase": 0.1, "kv_bits": 8}, 422, ["no report.json with a measurement"]),
        ({"max_kl": 1}, None, 422, ["no report.json with a measurement"]),
        ({}, None, 202, []),
        (None, None, 202, []),
    ],
)
async def test_the_gate(server: AdminServer, gate: Any, numbers: Any, status: int, words: list[str]) -> None:
    if numbers is not None:
        (server.models_dir / "new" / "report.json").write_text(report(**numbers))
    found, reply = await server.ask("POST", SWAP, {"model": "new", "gate": gate})
    assert found == status, reply
    for word in words:
        assert word in reply["error"]["message"]
    if status == 202:
        assert (await server.finished(reply["id"]))["status"] == "done"
        assert (reply["quality"] is None) == (numbers is None)
    else:
        assert await said(server) == "old"


async def test_a_broken_report_does_not_open_the_gate(server: AdminServer) -> None:
    (server.models_dir / "new" / "report.json").write_text("{")
    status, reply = await server.ask("POST", SWAP, {"model": "new", "gate": {"max_kl": 1}})
    assert (status, reply["error"]["code"]) == (422, "no_report")


async def test_counters_go_on_over_a_swap(server: AdminServer) -> None:
    """What the old engine had counted stays counted, and its blocks are no longer there."""

    async def metrics() -> dict[str, float]:
        async with server.session.get(server.url + "/metrics") as reply:
            lines = (await reply.text()).splitlines()
        samples = (line.split() for line in lines if line.startswith("lmdserve_") and "{" not in line)
        return {name: float(value) for name, value in samples}

    before = await metrics()
    await server.order(SWAP, model="new")
    after = await metrics()
    assert after["lmdserve_prompt_tokens_total"] == 2 * before["lmdserve_prompt_tokens_total"]
    assert after["lmdserve_kv_blocks"] == before["lmdserve_kv_blocks"]


async def test_a_server_that_stops_during_a_swap_leaves_nobody_waiting(model: ServedModel, tmp_path: Path) -> None:
    old = FakeEngine()
    loader = FakeLoader(model.folder)
    loader.how = "drain"
    loader.gate.clear()
    async with admin_server(old, model, tmp_path, loader) as server:
        server.model("new")
        await server.ask("POST", SWAP, {"model": "new"})
        await until(lambda: old.is_released)
        waiting = asyncio.create_task(server.ask("POST", CHAT, chat_body()))
        await asyncio.sleep(0.02)
        asyncio.get_running_loop().call_later(0.1, loader.gate.set)
        stopping = asyncio.create_task(server.app.shutdown())
        status, reply = await waiting
        assert (status, reply["error"]["code"]) == (503, "draining")
        await stopping
