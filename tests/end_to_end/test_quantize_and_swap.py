"""A real server under load quantizes what it serves, swaps to the result and back; a killed one resumes its job."""

import asyncio
import json
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from safetensors.torch import load_file, save_file
from server_process import ServerProcess
from streamed_answer import streamed_answer

import lmdserve

NUM_CLIENTS = 20
OPTIONS = {"calib_samples": 2, "calib_seqlen": 128, "eval_tokens": 256}
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add two numbers",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "required": ["a", "b"],
        },
    },
}


def start_server(models_dir: Path) -> ServerProcess:
    return ServerProcess("--models-dir", str(models_dir), "--admin", "--cache-max-entry-count", "96")


class Client:
    """Orders and requests to one server."""

    def __init__(self, server: ServerProcess, session: aiohttp.ClientSession) -> None:
        self._url = server.url
        self._session = session

    async def ask(self, method: str, path: str, body: Any = None) -> Any:
        async with self._session.request(method, self._url + path, json=body) as reply:
            assert reply.status < 300, await reply.text()
            return await reply.json()

    async def finished(self, job: Any, *, until_phase: str | None = None) -> Any:
        """Return the job's state when it is over, or in a phase."""
        state = job
        async with self._session.get(f"{self._url}/admin/jobs/{job['id']}/events") as reply:
            async for line in reply.content:
                if line.startswith(b"data: "):
                    state = json.loads(line[6:])
                if state["phase"] == until_phase:
                    break
        return state

    async def answer(self, index: int) -> str:
        return await streamed_answer(self._session, self._url, index, max_tokens=24)

    async def answers(self) -> list[str]:
        """Return the answers that the weights give that serve now."""
        return await asyncio.gather(*(self.answer(index) for index in range(NUM_CLIENTS)))

    async def checkpoint(self) -> Any:
        return (await self.ask("GET", "/v1/models"))["data"][0]["checkpoint"]


@asynccontextmanager
async def client_of(server: ServerProcess) -> AsyncIterator[Client]:
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=240)) as session:
        yield Client(server, session)


@pytest.mark.slow
async def test_streams_notice_nothing_of_a_quantization_a_swap_and_the_way_back(tmp_path: Path) -> None:
    """In float32 on a CPU an answer does not depend on what is computed beside it, so each one that was streamed
    meanwhile must be, character for character, what the old or the new weights answer alone.
    """
    server = start_server(tmp_path)
    try:
        async with client_of(server) as client:
            by_old = await client.answers()
            answers: list[tuple[int, str]] = []
            is_over = asyncio.Event()

            async def stream_on(index: int) -> None:
                while not is_over.is_set():
                    answers.append((index, await client.answer(index)))
                    await asyncio.sleep(1.0)

            streams = [asyncio.create_task(stream_on(index)) for index in range(NUM_CLIENTS)]
            order = {"work_dir": "awq", "then": "swap", "gate": {"max_kl": 0.2}, **OPTIONS}
            job = await client.finished(await client.ask("POST", "/admin/quantize", order))
            assert (job["status"], job["plan"]["how"]) == ("done", "beside"), job["error"]
            assert 0 < job["quality"]["kl_divergence"] < 0.2
            assert await client.checkpoint() == {"name": "awq", "format": "awq"}
            planned = (await client.ask("GET", "/admin/models"))["current"]["planned_bytes"]
            by_new = await client.answers()
            calls = await client.ask(
                "POST",
                "/v1/chat/completions",
                {"messages": [{"role": "user", "content": "What is 2 plus 3?"}], "tools": [ADD], "temperature": 0,
                 "tool_choice": "required"},
            )  # fmt: skip
            back = await client.finished(await client.ask("POST", "/admin/models/rollback"))
            assert back["status"] == "done", back["error"]
            assert (await client.checkpoint())["name"] == "demo"
            is_over.set()
            await asyncio.gather(*streams)
            assert await client.answers() == by_old
        assert sum(planned.values()) == job["plan"]["after_bytes"] < job["plan"]["running_bytes"]
        assert set(json.loads(_arguments(calls))) == {"a", "b"}
        assert by_new != by_old
        altered = [text for index, text in answers if text not in (by_old[index], by_new[index])]
        assert altered == []
        assert len(answers) >= NUM_CLIENTS
        assert server.stop() == 0
        assert "Traceback" not in server.log()
    finally:
        server.close()


def _arguments(reply: Any) -> str:
    return str(reply["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"])


@pytest.mark.slow
async def test_a_job_outlives_a_kill_of_its_server(tmp_path: Path) -> None:
    """The worker dies with the server; the next server has the job completed, from where it was."""
    server = start_server(tmp_path)
    try:
        async with client_of(server) as client:
            order = {"work_dir": "awq", **OPTIONS, "skip_evaluation": True}
            job = await client.ask("POST", "/admin/quantize", order)
            await client.finished(job, until_phase="search")
            server.process.send_signal(signal.SIGKILL)
            server.process.wait()
        assert not (tmp_path / "awq" / "config.json").exists()
    finally:
        server.close()
    server = start_server(tmp_path)
    try:
        async with client_of(server) as client:
            state = await client.finished(job)
            assert (state["status"], state["created"]) == ("done", job["created"]), state["error"]
        assert (tmp_path / "awq" / "config.json").exists()
        assert not (tmp_path / "awq" / ".quantize").exists()
        assert server.stop() == 0
    finally:
        server.close()


@pytest.mark.slow
async def test_what_cannot_be_quantized_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    """A text that is too short, a data set that nobody has, weights that are not numbers, and a disk that is full."""
    models_dir, disk = tmp_path / "models", tmp_path / "models" / "disk"
    disk.mkdir(parents=True)
    (models_dir / "short.txt").write_text("Too short.")
    write_with_nan(models_dir / "nan")
    has_small_disk = (
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], check=False).returncode == 0
    )
    server = start_server(models_dir)
    try:
        async with client_of(server) as client:
            before = await client.answer(1)
            cases = [
                ({"work_dir": "out", "calib_dataset": "short.txt"}, "short.txt has "),
                ({"work_dir": "out", "calib_dataset": "no_such_set"}, "no_such_set"),
                ({"work_dir": "out", "model": "nan"}, "model.layers.3.feed_forward.w2.weight"),
            ]
            if has_small_disk:
                cases.append(({"work_dir": "disk/out"}, "free"))
            for order, words in cases:
                job = await client.finished(await client.ask("POST", "/admin/quantize", {**OPTIONS, **order}))
                assert (job["status"], job["error"]["code"]) == ("failed", "quantization_failed")
                assert words in job["error"]["message"]
                assert "Traceback" not in job["error"]["message"]
                assert not (models_dir / order["work_dir"]).exists()
            assert await client.answer(1) == before
    finally:
        server.close()
        if has_small_disk:
            subprocess.run(["umount", disk], check=True)


def write_with_nan(folder: Path) -> None:
    """Write a copy of the demo model in which one weight is not a number."""
    demo = Path(lmdserve.__file__).parent / "demo" / "model"
    shutil.copytree(demo, folder)
    name = "model.layers.3.feed_forward.w2.weight"
    shard = folder / json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name]
    tensors = load_file(shard)
    tensors[name][5, 7] = float("nan")
    save_file(tensors, shard)
