"""A scripted OpenAI server on a free port: each chat request plays the next act and is recorded."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from aiohttp import web

Act = Callable[[web.Request], Awaitable[web.StreamResponse]]


class FakeServer:
    """Acts are queued by `say`, `call`, `stream`, `refuse`...; the last one is repeated when the queue is empty."""

    def __init__(self) -> None:
        self.url = ""
        self.model_names = ["demo", "other"]
        self.bodies: list[dict[str, Any]] = []  # of chat and completion requests, in order of arrival
        self.authorizations: list[str | None] = []
        self.ports: list[int] = []  # the client's end of the connection of each request
        self.num_running = 0
        self.most_running = 0  # requests at once
        self.num_disconnects = 0
        self.was_left = asyncio.Event()  # set when a client left before the end
        self._acts: list[Act] = []

    def say(self, *fragments: str, finish_reason: str = "stop", num_tokens: int | None = None) -> None:
        """Stream an answer, one chunk a fragment, ending with counts: by default one token a fragment."""
        chunks = [delta_chunk(role="assistant", content="")]
        chunks += [delta_chunk(content=fragment) for fragment in fragments]
        self.stream([*chunks, delta_chunk(finish_reason=finish_reason), usage_chunk(num_tokens or len(fragments))])

    def call(self, *calls: tuple[str, list[str]]) -> None:
        """Stream tool calls: for each a name, then fragments of its arguments."""
        chunks = [delta_chunk(role="assistant")]
        for index, (name, fragments) in enumerate(calls):
            start = {"index": index, "id": f"call_{index}", "type": "function", "function": {"name": name}}
            chunks.append(delta_chunk(tool_calls=[start]))
            pieces = [{"index": index, "function": {"arguments": fragment}} for fragment in fragments]
            chunks += [delta_chunk(tool_calls=[piece]) for piece in pieces]
        self.stream([*chunks, delta_chunk(finish_reason="tool_calls"), usage_chunk(7)])

    def stream(self, chunks: list[dict[str, Any]], *, pause_s: float = 0.0, ends: str = "done") -> None:
        """Stream any chunks; `ends`: "done", "hang" (stay open), "done, then hang", or "break" (no [DONE])."""

        async def act(request: web.Request) -> web.StreamResponse:
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await response.prepare(request)
            for chunk in chunks:
                await response.write(f"data: {json.dumps(chunk)}\n\n".encode())
                await asyncio.sleep(pause_s)
            if ends.startswith("done"):
                await response.write(b"data: [DONE]\n\n")
            if ends.endswith("hang"):
                await asyncio.sleep(60)
            return response

        self._acts.append(act)

    def raw(self, body: bytes, *, status: int = 200, content_type: str = "text/event-stream", **headers: str) -> None:
        """Answer with exactly these bytes."""

        async def act(request: web.Request) -> web.StreamResponse:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            return web.Response(body=body, status=status, headers={"Content-Type": content_type} | named)

        self._acts.append(act)

    def refuse(self, status: int, error: dict[str, Any], **headers: str) -> None:
        """Answer with an error in OpenAI's shape."""
        body = json.dumps({"error": error}).encode()
        self.raw(body, status=status, content_type="application/json", **headers)

    async def answer(self, request: web.Request) -> web.StreamResponse:
        """Play the next act."""
        self._record(request)
        self.bodies.append(await request.json())
        act = self._acts.pop(0) if len(self._acts) > 1 else self._acts[0]
        self.num_running += 1
        self.most_running = max(self.most_running, self.num_running)
        try:
            return await act(request)
        except (asyncio.CancelledError, ConnectionError):
            self.num_disconnects += 1
            self.was_left.set()
            raise
        finally:
            self.num_running -= 1

    async def models(self, request: web.Request) -> web.Response:
        """List the models."""
        self._record(request)
        return web.json_response({"object": "list", "data": [{"id": name} for name in self.model_names]})

    def _record(self, request: web.Request) -> None:
        self.authorizations.append(request.headers.get("Authorization"))
        assert request.transport is not None
        self.ports.append(request.transport.get_extra_info("peername")[1])


def delta_chunk(*, finish_reason: str | None = None, **delta: Any) -> dict[str, Any]:
    """Return a chunk with one choice."""
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}]}


def usage_chunk(num_tokens: int) -> dict[str, Any]:
    """Return the chunk that carries token counts."""
    counts = {"prompt_tokens": 11, "completion_tokens": num_tokens, "total_tokens": 11 + num_tokens}
    return {"choices": [], "usage": counts | {"prompt_tokens_details": {"cached_tokens": 4}}}


@pytest.fixture
async def fake_server() -> AsyncIterator[FakeServer]:
    fake = FakeServer()
    app = web.Application()
    app.router.add_get("/v1/models", fake.models)
    app.router.add_post("/v1/chat/completions", fake.answer)
    app.router.add_post("/v1/completions", fake.answer)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    fake.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield fake
    await runner.cleanup()
