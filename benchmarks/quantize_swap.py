"""Quantize and swap over HTTP under load: what the clients notice of it, and what it gains. Prints Markdown rows.

    python benchmarks/quantize_swap.py --clients 50 --score-cases 200
    python benchmarks/quantize_swap.py --model M/fp16 --models-dir M --swap-to awq --server=--quant-policy=8

A server process is started with orders open to this machine. Clients stream greedy answers, one after another, all the
time. The checkpoint is quantized with `then: swap` (or another one swapped in), and after a while rolled back. Each
answer must be whole; with `--compare` (for a CPU in float32, where answers do not depend on the batch) it must also be,
character for character, what the old or the new weights answer alone. Latencies are the gaps between the arrivals of
one stream, counted to the phase in which they end. Memory is the process's, or torch's on the GPU.
"""

import argparse
import asyncio
import datetime
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp
import torch

import lmdserve

START_TIMEOUT_S = 300.0
WORDS = ("time", "fox", "water", "river", "stone", "music", "light", "winter", "garden", "letter", "window", "bread")
MIB = 2**20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--models-dir", help="default: a new temporary folder")
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=15.0, help="of load before, after and between orders")
    parser.add_argument("--swap-to", help="swap to this checkpoint in place of quantizing one")
    parser.add_argument("--quantize", type=json.loads, default={}, help="options of the quantization, as JSON")
    parser.add_argument("--cancel-after", type=float, help="cancel the quantization after so many seconds; no swap")
    parser.add_argument("--score-cases", type=int, default=0, help="held-out tool calls to score the demo model on")
    parser.add_argument("--compare", action="store_true", help="compare every answer with those of an idle server")
    parser.add_argument("--server", action="append", default=[], help="an option of the server, such as --tp=1")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        models_dir = arguments.models_dir or folder
        server = Server(arguments.model, ["--models-dir", models_dir, "--admin", *arguments.server])
        try:
            return asyncio.run(Benchmark(server, arguments).run())
        finally:
            server.stop()


class Server:
    """A server process on a free port."""

    def __init__(self, model: str, options: Sequence[str]) -> None:
        command = [sys.executable, "-m", "lmdserve", "--model", model, "--server-port", "0", "--log-level", "WARNING"]
        self.process = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True)
        watchdog = threading.Timer(START_TIMEOUT_S, self.process.kill)
        watchdog.start()
        assert self.process.stdout is not None
        self.url = next(found[0] for line in self.process.stdout if (found := re.search(r"http://\S+?:\d+", line)))
        watchdog.cancel()

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait()

    def resident_bytes(self) -> int:
        status = Path(f"/proc/{self.process.pid}/status").read_text("ascii")
        return 1024 * int(re.findall(r"VmRSS:\s+(\d+) kB", status)[0])


class Benchmark:
    """One run: clients that never stop, orders, and a note of what came when."""

    def __init__(self, server: Server, arguments: argparse.Namespace) -> None:
        self._server = server
        self._arguments = arguments
        self._prompts = [
            f"Tell me a story about {WORDS[i % len(WORDS)]} and {WORDS[-1 - i // len(WORDS)]}"
            for i in range(arguments.clients)
        ]
        self._phase = "before"
        self._seconds: dict[str, float] = defaultdict(float)
        self._gaps_s: dict[str, list[float]] = defaultdict(list)
        self._memory: dict[str, int] = {}
        self._answers: list[tuple[int, str]] = []
        self._failures: list[str] = []
        self._is_over = False

    async def run(self) -> int:
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None)) as session:
            self._session = session
            references = [await self._references()]
            scores = [await self._score()]
            clients = [asyncio.create_task(self._client(index)) for index in range(self._arguments.clients)]
            await self._in_phase("before", asyncio.sleep(self._arguments.seconds))
            job = await self._order()
            await self._in_phase("after", asyncio.sleep(self._arguments.seconds))
            card = await self._get("/v1/models")
            if self._arguments.cancel_after is None:
                await self._in_phase("rolling back", self._follow(await self._post("/admin/models/rollback", {})))
                await self._in_phase("back", asyncio.sleep(self._arguments.seconds))
            self._is_over = True
            await asyncio.gather(*clients)
            if self._arguments.compare or self._arguments.score_cases:
                await self._follow(await self._post("/admin/models/swap", {"model": job["work_dir"] or job["model"]}))
                references.append(await self._references())
                scores.append(await self._score())
        self._print(job, card["data"][0], references, scores)
        return 1 if self._failures else 0

    async def _order(self) -> Any:
        """Quantize and swap, or only swap; the phases end with those of the job."""
        if self._arguments.swap_to:
            job = await self._post("/admin/models/swap", {"model": self._arguments.swap_to})
        else:
            job = await self._post(
                "/admin/quantize", {"work_dir": "quantized", "then": "swap", **self._arguments.quantize}
            )
        work = self._follow(job) if self._arguments.cancel_after is None else self._cancel_later(job)
        return await self._in_phase("quantizing" if job["kind"] == "quantize" else "swapping", work)

    async def _cancel_later(self, job: Any) -> Any:
        await asyncio.sleep(self._arguments.cancel_after)
        state = await self._get(f"/admin/jobs/{job['id']}")
        if state["status"] != "running":
            raise SystemExit(f"the job was {state['status']} before it could be cancelled: {state['error']}")
        print(f"cancelled in phase {state['phase']}, layer {state['layer']}, at {state['percent']} %\n")
        async with self._session.delete(f"{self._server.url}/admin/jobs/{job['id']}") as reply:
            answer = await reply.json()
            if reply.status != 200:
                raise SystemExit(f"the job could not be cancelled: {reply.status} {answer}")
            return answer

    async def _in_phase(self, phase: str, work: Any) -> Any:
        self._phase, start_s = phase, time.perf_counter()
        result = await work
        # A swap that follows a quantization is a phase of its own, which began in `_follow`.
        if phase not in self._seconds:
            self._seconds[phase] += time.perf_counter() - start_s
        await self._note_memory(self._phase)
        return result

    async def _follow(self, job: Any) -> Any:
        start_s = time.perf_counter()
        state = job
        async with self._session.get(f"{self._server.url}/admin/jobs/{job['id']}/events") as reply:
            async for line in reply.content:
                if not line.startswith(b"data: "):
                    continue
                state = json.loads(line[6:])
                if state["phase"] == "load" and self._phase == "quantizing":
                    self._seconds["quantizing"] = time.perf_counter() - start_s
                    await self._note_memory("quantizing")
                    self._phase, start_s = "swapping", time.perf_counter()
        if self._phase == "swapping":
            self._seconds["swapping"] = time.perf_counter() - start_s
        if state["status"] != "done":
            raise SystemExit(f"the job failed: {state['error']}")
        return state

    async def _client(self, index: int) -> None:
        while not self._is_over:
            try:
                self._answers.append((index, await self._stream(self._prompts[index])))
            except (aiohttp.ClientError, RuntimeError) as error:
                self._failures.append(f"{type(error).__name__}: {error}")

    async def _stream(self, prompt: str) -> str:
        """Return a streamed answer; RuntimeError unless it is whole."""
        body = {"messages": [{"role": "user", "content": prompt}], "max_tokens": self._arguments.output_len,
                "temperature": 0, "ignore_eos": True, "stream": True}  # fmt: skip
        received, arrived_s = [], 0.0
        async with self._session.post(f"{self._server.url}/v1/chat/completions", json=body) as reply:
            async for data in reply.content.iter_any():
                now_s = time.perf_counter()
                if arrived_s:
                    self._gaps_s[self._phase].append(now_s - arrived_s)
                arrived_s = now_s
                received.append(data)
        events = [line[6:] for line in b"".join(received).split(b"\n") if line.startswith(b"data: ")]
        if reply.status != 200 or not events or events[-1] != b"[DONE]":
            raise RuntimeError(f"status {reply.status}, ended with {received[-1:]!r}")
        choices = [json.loads(event)["choices"][0] for event in events[:-1]]
        if choices[-1]["finish_reason"] != "length":
            raise RuntimeError(f"finish_reason {choices[-1]['finish_reason']}")
        return "".join(choice["delta"].get("content") or "" for choice in choices)

    async def _references(self) -> list[str]:
        """Return what the weights that serve now answer, one prompt after another."""
        return [await self._stream(prompt) for prompt in self._prompts] if self._arguments.compare else []

    async def _score(self) -> str:
        if not self._arguments.score_cases:
            return ""
        cases = str(self._arguments.score_cases)
        command = [sys.executable, "-m", "lmdserve.demo.evaluate", self._server.url, "--cases", cases]
        process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
        report = (await process.communicate())[0].decode()
        found = re.search(r"^all calls \(exact\)\s+(\S+%)\s+\S+\s+(\d+)", report, re.MULTILINE)
        assert found is not None, report
        return f"{found[1]} of {found[2]}"

    async def _note_memory(self, phase: str) -> None:
        async with self._session.get(f"{self._server.url}/metrics") as reply:
            found = re.findall(r"^lmdserve_device_memory_bytes (\S+)$", await reply.text(), re.MULTILINE)
        self._memory[phase] = int(float(found[0])) or self._server.resident_bytes()

    async def _post(self, path: str, body: Any) -> Any:
        async with self._session.post(self._server.url + path, json=body) as reply:
            answer = await reply.json()
            if reply.status != 202:
                raise SystemExit(f"{path}: {reply.status} {answer}")
            return answer

    async def _get(self, path: str) -> Any:
        async with self._session.get(self._server.url + path) as reply:
            return await reply.json()

    def _print(self, job: Any, card: Any, references: list[list[str]], scores: list[str]) -> None:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        print(f"{datetime.date.today()}, lmdserve {lmdserve.__version__}, torch {torch.__version__}, {device}\n")
        print("| phase | s | events/s | ITL p50 / p99 / max ms | memory at its end, MiB |\n|---|---|---|---|---|")
        for phase, gaps_s in self._gaps_s.items():
            seconds, ordered = self._seconds[phase], sorted(gaps_s)
            p50, p99 = (1000 * ordered[int(share * (len(ordered) - 1))] for share in (0.5, 0.99))
            memory = round(self._memory[phase] / MIB)
            print(f"| {phase} | {seconds:.1f} | {len(gaps_s) / seconds:.0f} | {p50:.1f} / {p99:.1f} / "
                  f"{1000 * ordered[-1]:.0f} | {memory} |")  # fmt: skip
        print(f"\nanswers {len(self._answers)}, failed {len(self._failures)}{self._altered(references)}; "
              f"checkpoint then {card['checkpoint']}")  # fmt: skip
        print(f"plan {job['plan']}\nquality {job['quality']}")
        if self._arguments.score_cases:
            print(f"exact tool calls before {scores[0]}, after {scores[1]}")
        for failure in self._failures[:3]:
            print("failure:", failure)

    def _altered(self, references: list[list[str]]) -> str:
        if not self._arguments.compare:
            return ""
        old, new = references
        by_old = sum(text == old[index] for index, text in self._answers)
        by_new = sum(text == new[index] != old[index] for index, text in self._answers)
        return f", by the old weights {by_old}, by the new {by_new}, altered {len(self._answers) - by_old - by_new}"


if __name__ == "__main__":
    sys.exit(main())
