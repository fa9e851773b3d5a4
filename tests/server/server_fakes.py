"""What the server is tested with: a fake engine with scripted answers, and the application around it on a real port.

Token ids 0 to 255 are bytes; the control tokens follow. What the engine "generates" is exactly what a test says.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager

from lmdserve.engine.api import Chunk, EngineInfo, EngineStats, FinishReason, Request, TokenLogprob
from lmdserve.server.app import build, listening
from lmdserve.server.config import ServerConfig
from lmdserve.server.model import ServedModel

CONTROL_TOKENS = ("<s>", "</s>", "<|im_end|>", "<|im_start|>", "<|action_end|>", "<|action_start|>",
                  "<|interpreter|>", "<|plugin|>")  # fmt: skip
CONTROL_IDS = {text: 256 + position for position, text in enumerate(CONTROL_TOKENS)}
IM_END = CONTROL_IDS["<|im_end|>"]
VOCAB_SIZE = 256 + len(CONTROL_TOKENS)
SESSION_LEN = 4096
QUEUED_S = 0.125  # what every request is said to have waited

Script = Iterable[Chunk | float | Exception]


def text_ids(text: str) -> list[int]:
    """Return the ids of a text in which control tokens are spelled out."""
    ids: list[int] = []
    while text:
        control = next((token for token in CONTROL_TOKENS if text.startswith(token)), None)
        ids += [CONTROL_IDS[control]] if control else list(text[0].encode())
        text = text[len(control or text[0]) :]
    return ids


def answer(
    text: str,
    *,
    finish: FinishReason = FinishReason.STOP,
    tokens_a_chunk: int = 1,
    num_cached_tokens: int = 0,
    pause_s: float | None = None,
) -> Script:
    """Return the chunks of an answer, ended by <|im_end|> if it stops; pauses before each when asked to."""
    ids = text_ids(text) + ([IM_END] if finish is FinishReason.STOP else [])
    for start in range(0, len(ids), tokens_a_chunk):
        if pause_s is not None:
            yield pause_s
        part = tuple(ids[start : start + tokens_a_chunk])
        is_last = start + tokens_a_chunk >= len(ids)
        yield Chunk(part, None, None, num_cached_tokens, finish if is_last else None)


def with_logprobs(script: Script, num_top: int) -> Script:
    """Give each token the logprob -(id / 100) and the ids right after it as runners-up."""
    for item in script:
        if isinstance(item, Chunk):
            item = item._replace(logprobs=tuple(token_logprob(token_id, num_top) for token_id in item.token_ids))
        yield item


def token_logprob(token_id: int, num_top: int) -> TokenLogprob:
    top = tuple((token_id + place, -(token_id + place) / 100) for place in range(num_top))
    return TokenLogprob(token_id, -token_id / 100, top)


class FakeEngine:
    """Plays `script(request)` for each request and remembers what it was asked and what was taken from it early."""

    def __init__(self) -> None:
        self.info = EngineInfo(
            vocab_size=VOCAB_SIZE,
            session_len=SESSION_LEN,
            eos_token_ids=frozenset({CONTROL_IDS["</s>"]}),
            planned_bytes={"weights": 1_000_000_000, "KV cache": 2_000_000_000},
        )
        self.script: Callable[[Request], Script] = lambda request: answer("Hello!")
        self.requests: list[Request] = []
        self.live: set[str] = set()
        self.aborted: list[str] = []
        self.stopped_after_s: list[float] = []
        self.is_released = False
        self.health_error: Exception | None = None
        self.is_started = False

    async def start(self) -> None:
        self.is_started = True

    async def stop(self, timeout_s: float) -> None:
        self.stopped_after_s.append(timeout_s)

    def release(self) -> None:
        assert self.stopped_after_s
        assert not self.live
        self.is_released = True

    async def generate(self, request: Request) -> AsyncIterator[Chunk]:
        assert not self.is_released
        assert request.uid not in self.live
        self.requests.append(request)
        self.live.add(request.uid)
        is_done = is_begun = False
        try:
            for item in self.script(request):
                if isinstance(item, Exception):
                    is_done = True
                    raise item
                await asyncio.sleep(item if isinstance(item, float) else 0)
                if isinstance(item, Chunk):
                    is_done = item.finish_reason is not None
                    yield item if is_begun else item._replace(queued_s=QUEUED_S)
                    is_begun = True
        finally:
            self.live.remove(request.uid)
            if not is_done:
                self.aborted.append(request.uid)

    def stats(self) -> EngineStats:
        return EngineStats(
            num_running=len(self.live), num_waiting=2, num_total_blocks=100, num_used_blocks=25, num_cached_blocks=10,
            prompt_tokens_total=1000, generation_tokens_total=500, cached_tokens_total=300, preemptions_total=1,
            steps_total=77, heartbeat_age_s=0.25, drafted_tokens_total=40, accepted_tokens_total=30,
            device_busy_s_total=9.5, device_memory_bytes=5_000_000_000,
            device_idle_s_total=0.5,
        )  # fmt: skip

    def check_health(self) -> None:
        if self.health_error is not None:
            raise self.health_error

    async def until_idle(self, timeout_s: float = 1.0) -> None:
        """Return once nothing runs; TimeoutError if something still does after `timeout_s`."""
        async with asyncio.timeout(timeout_s):
            while self.live:
                await asyncio.sleep(0.002)


@asynccontextmanager
async def running(engine: FakeEngine, model: ServedModel, **options: object) -> AsyncIterator[str]:
    """Serve on a free port while the context lasts; gives the URL."""
    config = ServerConfig(server_port=0, **options)  # type: ignore[arg-type]
    async with listening(build(engine, model, config), config) as url:
        yield url


def chat_body(text: str = "Hi", **fields: object) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": text}], **fields}
