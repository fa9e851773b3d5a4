"""Who may give orders, what they may name, and how a bad one is refused."""

import dataclasses
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import jsonschema
import pytest
from admin_fakes import AdminServer, admin_server, quantizing
from server_fakes import FakeEngine, running

from lmdserve.engine.api import ConfigError
from lmdserve.engine.quantize.options import QuantizeOptions
from lmdserve.server import cli
from lmdserve.server.admin_protocol import NOT_IN_ORDERS, QuantizeOrder
from lmdserve.server.config import ServerConfig, check_admin
from lmdserve.server.model import ServedModel
from lmdserve.server.openapi import describe_api
from lmdserve.server.routes import routes

QUANTIZE, SWAP = "/admin/quantize", "/admin/models/swap"
ADMIN_ROUTES = [(route.method, route.path) for route in routes() if route.path.startswith("/admin")]


@pytest.fixture
async def server(engine: FakeEngine, model: ServedModel, tmp_path: Path) -> AsyncIterator[AdminServer]:
    async with admin_server(engine, model, tmp_path) as server:
        yield server


async def test_orders_are_off_unless_turned_on(
    session: aiohttp.ClientSession, engine: FakeEngine, model: ServedModel
) -> None:
    async with running(engine, model, api_keys=("alpha",)) as url:
        for method, path in [*ADMIN_ROUTES, ("GET", "/admin"), ("GET", "/admin/nowhere")]:
            headers = {"Authorization": "Bearer alpha"}
            async with session.request(method, url + path, json={}, headers=headers) as reply:
                assert reply.status == 403, path
                error = (await reply.json())["error"]
                assert error["code"] == "admin_off"
                assert "--admin-keys" in error["message"]


@pytest.mark.parametrize("authorization", [None, "Bearer alpha", "Bearer ", "Basic omega", "Bearer wrong"])
async def test_only_an_admin_key_opens_the_door(
    engine: FakeEngine, model: ServedModel, tmp_path: Path, authorization: str | None
) -> None:
    options = {"admin": False, "api_keys": ("alpha",), "admin_keys": ("omega", "psi")}
    async with admin_server(engine, model, tmp_path, **options) as server:
        for method, path in ADMIN_ROUTES:
            headers = {} if authorization is None else {"Authorization": authorization}
            status, reply = await server.ask(method, path, {}, headers=headers)
            assert (status, reply["error"]["code"]) == (401, "invalid_api_key"), path
            assert "admin key" in reply["error"]["message"] or "Bearer KEY" in reply["error"]["message"]
        for key in ("omega", "psi"):
            status, _ = await server.ask("GET", "/admin/jobs", headers={"Authorization": f"Bearer {key}"})
            assert status == 200
        status, _ = await server.ask("GET", "/v1/models", headers={"Authorization": "Bearer omega"})
        assert status == 401


@pytest.mark.parametrize(
    "path", ["/%61dmin/jobs", "/admin%2Fjobs", "//admin/jobs", "/admin/../admin/jobs", "/Admin/jobs"]
)
async def test_no_spelling_of_the_path_goes_round_the_door(
    session: aiohttp.ClientSession, engine: FakeEngine, model: ServedModel, path: str
) -> None:
    from yarl import URL

    async with (
        running(engine, model) as url,
        session.get(URL(url + path, encoded=True)) as reply,
    ):
        assert reply.status in (403, 404)


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://127.0.0.1:23333"},
        {"X-Forwarded-For": "10.0.0.1"},
        {"Forwarded": "for=10.0.0.1"},
        {"Via": "1.1 proxy"},
        {"Host": "models.example"},
        {"Host": "127.0.0.1.example:23333"},
    ],
    ids=str,
)
async def test_without_a_key_browsers_and_proxies_are_refused(server: AdminServer, headers: dict[str, str]) -> None:
    """They are on this machine, and may speak for somebody who is not."""
    status, reply = await server.ask("GET", "/admin/jobs", headers=headers)
    assert (status, reply["error"]["code"]) == (403, "admin_off")
    assert (await server.ask("GET", "/admin/jobs"))[0] == 200


def test_options_that_do_not_go_together_are_refused_at_start(tmp_path: Path) -> None:
    for options, message in (
        ({"admin": True}, "need --models-dir"),
        ({"admin_keys": ("a",)}, "need --models-dir"),
        ({"admin": True, "models_dir": str(tmp_path / "none")}, "is no folder"),
        ({"admin": True, "models_dir": str(tmp_path), "server_name": "0.0.0.0"}, "--server-name is 0.0.0.0"),
        ({"admin_keys": ("a",), "api_keys": ("a",), "models_dir": str(tmp_path)}, "in --api-keys and in --admin-keys"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_admin(ServerConfig(**options))  # type: ignore[arg-type]
    for name in ("127.0.0.1", "::1", "localhost"):
        check_admin(ServerConfig(admin=True, models_dir=str(tmp_path), server_name=name))
    check_admin(ServerConfig(admin_keys=("a",), models_dir=str(tmp_path), server_name="0.0.0.0"))
    check_admin(ServerConfig(server_name="0.0.0.0"))


def test_admin_keys_come_from_the_environment_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMDSERVE_ADMIN_KEYS", "b, a")
    config = cli._with_keys_from_environment(ServerConfig(admin_keys=("a",)))
    assert (config.admin_keys, config.api_keys) == (("a", "b"), ())


@pytest.fixture
def outside(tmp_path_factory: pytest.TempPathFactory, server: AdminServer) -> Path:
    """A checkpoint outside of the models' folder, with links to it and its parent inside."""
    folder = tmp_path_factory.mktemp("outside")
    (folder / "config.json").write_text("{}")
    (folder / "text.txt").write_text("secret")
    (server.models_dir / "link").symlink_to(folder)
    (server.models_dir / "up").symlink_to(folder.parent)
    (server.models_dir / "circle").symlink_to(server.models_dir / "circle")
    (server.models_dir / "text.txt").symlink_to(folder / "text.txt")
    return folder


async def test_no_path_leads_out_of_the_models_folder(server: AdminServer, outside: Path) -> None:
    server.model("model", quantizing())
    ways_out = ["..", ".", "../x", str(outside), "link", "up/x", "circle", "a\0b", "x" * 300, "/", "/etc", ".jobs",
                ".hidden", "model/../../x", "no/such/parent"]  # fmt: skip
    for text in ways_out:
        for path, field, body in (
            (SWAP, "model", {"model": text}),
            (QUANTIZE, "model", {"model": text, "work_dir": "out"}),
            (QUANTIZE, "work_dir", {"model": "model", "work_dir": text}),
            (QUANTIZE, "calib_data_dir", {"model": "model", "work_dir": "out", "calib_data_dir": text}),
        ):
            if (text, field) == (".", "calib_data_dir"):
                continue  # data sets may lie in the models' folder itself
            status, reply = await server.ask("POST", path, body)
            assert (status, reply["error"]["param"]) == (400, field), (text, field, reply)
    for text in ("../text.txt", "text.txt", str(outside / "text.txt"), "./text.txt"):
        for field in ("calib_dataset", "eval_dataset"):
            status, reply = await server.ask("POST", QUANTIZE, {"model": "model", "work_dir": "out2", field: text})
            assert (status, reply["error"]["param"]) == (400, field), text
    assert not (server.models_dir / "out2").exists()


async def test_texts_in_the_models_folder_and_names_of_data_sets_are_passed_on(server: AdminServer) -> None:
    server.model("model", quantizing())
    (server.models_dir / "own.txt").write_text("text")
    order = {"model": "model", "work_dir": "out", "calib_dataset": "own.txt", "eval_dataset": "wikitext2"}
    assert (await server.order(QUANTIZE, **order))["status"] == "done"
    ((_, *arguments),) = server.attempts("model")
    assert f"--calib-dataset={server.models_dir / 'own.txt'}" in arguments
    assert "--eval-dataset=wikitext2" in arguments


@pytest.mark.parametrize(
    ("path", "body", "param", "words"),
    [
        (QUANTIZE, {}, "work_dir", "is missing"),
        (QUANTIZE, {"work_dir": "out", "calib_sampels": 3}, "calib_sampels", "did you mean calib_samples?"),
        (QUANTIZE, {"work_dir": "out", "overwrite": True}, "overwrite", "is not a field"),
        (QUANTIZE, {"work_dir": "out", "calib_samples": -1}, "calib_samples", "got -1"),
        (QUANTIZE, {"work_dir": "out", "w_group_size": 100}, "w_group_size", 'one of "-1", "32", "64", "128"'),
        (QUANTIZE, {"work_dir": "out", "w_sym": "yes"}, "w_sym", "true or false"),
        (QUANTIZE, {"work_dir": "out", "then": "serve"}, "then", 'one of "swap"'),
        (QUANTIZE, {"work_dir": "out", "gate": {"max_kl": 1}}, "gate", '"then": "swap"'),
        (QUANTIZE, {"work_dir": "out", "then": "swap", "gate": {"max_k": 1}}, "gate.max_k", "is not a field"),
        (QUANTIZE, {"work_dir": "model"}, "work_dir", "is there already"),
        (QUANTIZE, {"work_dir": "out", "model": "none"}, "model", "there is no 'none'"),
        (QUANTIZE, {"work_dir": "out", "model": "empty"}, "model", "no checkpoint"),
        (SWAP, {}, "model", "is missing"),
        (SWAP, {"model": "model", "gate": {"max_kl": -1}}, "gate.max_kl", "got -1"),
        (SWAP, {"model": "model", "how": "quickly"}, "how", 'one of "auto", "beside", "drain"'),
        (SWAP, {"model": "empty"}, "model", "no checkpoint"),
        ("/admin/models/rollback", {"model": "x"}, "model", "is not a field"),
    ],
    ids=str,
)  # fmt: skip
async def test_a_bad_order_is_refused_with_the_field_at_fault(
    server: AdminServer, path: str, body: Any, param: str, words: str
) -> None:
    server.model("model", quantizing())
    (server.models_dir / "empty").mkdir()
    status, reply = await server.ask("POST", path, body)
    assert (status, reply["error"]["param"]) == (400, param), reply
    assert words in reply["error"]["message"]
    assert (await server.ask("GET", "/admin/jobs"))[1]["data"] == []


async def test_orders_are_json(server: AdminServer) -> None:
    async with server.session.post(server.url + SWAP, data=b"{}", headers={"Content-Type": "text/plain"}) as reply:
        assert reply.status == 415
    async with server.session.post(server.url + SWAP, data=b"{", headers={"Content-Type": "application/json"}) as reply:
        assert reply.status == 400


async def test_unknown_jobs(server: AdminServer) -> None:
    for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/events")):
        status, reply = await server.ask(method, f"/admin/jobs/job-0{path}")
        assert (status, reply["error"]["code"]) == (404, "job_not_found")


async def test_what_serves_is_shown(server: AdminServer, model: ServedModel, engine: FakeEngine) -> None:
    status, shown = await server.ask("GET", "/admin/models")
    assert status == 200
    assert shown == {
        "model": "toy",
        "current": {"checkpoint": model.checkpoint, "folder": str(model.folder), "format": "hf", "kv_tokens": 0,
                    "planned_bytes": engine.info.planned_bytes},
        "previous": None,
        "finishing": [],
    }  # fmt: skip


def test_an_order_has_every_option_of_the_command() -> None:
    options = {field.name for field in dataclasses.fields(QuantizeOptions)} - set(NOT_IN_ORDERS)
    assert options <= set(QuantizeOrder.__struct_fields__)
    description = {**describe_api(), "$ref": "#/components/schemas/QuantizeOrder"}
    validator = jsonschema.Draft202012Validator(description)
    assert validator.is_valid({"work_dir": "out", "w_group_size": -1, "calib_samples": 1, "gate": {"max_kl": 0.1}})
    for wrong in ({}, {"work_dir": "out", "calib_samples": -1}, {"work_dir": "out", "w_bits": 3}, {"work_dir": 1}):
        assert not validator.is_valid(wrong), json.dumps(wrong)
