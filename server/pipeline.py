"""`from lmdserve import pipeline`: a model inside your own program, without HTTP.

The engine runs on an event loop in a thread of its own, so a pipeline works the same in a plain script, in a notebook
(whose loop is already running) and inside an asyncio program. Prompts are chats: a string is one user message.
"""

import asyncio
import contextlib
import dataclasses
import itertools
import queue
import threading
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, cast

from lmdserve.engine.api import Chunk, Engine, TokenLogprob
from lmdserve.engine.config import EngineConfig
from lmdserve.engine.torch_setup import prepare_torch
from lmdserve.tools.api import (
    ContentDelta,
    Event,
    ReasoningDelta,
    ToolCall,
    ToolCallAborted,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
    fold,
)

from .choices import ChoiceStream
from .model import ServedModel, load_served_model
from .parsing import read_record
from .protocol import ChatRequest
from .serving import make_serving

Message = Mapping[str, Any]
Prompt = str | Sequence[Message]

CLOSE_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationConfig:
    """How to generate, in LMDeploy's names. Greedy unless `do_sample`; then the sampling fields apply.

    The last four are the fields of the same names in /v1/chat/completions, and mean the same.
    """

    max_new_tokens: int = 512
    min_new_tokens: int = 0
    do_sample: bool = False
    temperature: float = 0.8
    top_p: float = 1.0
    top_k: int = 50
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    random_seed: int | None = None
    stop_words: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    response_format: Mapping[str, Any] | None = None
    tools: Sequence[Mapping[str, Any]] | None = None
    tool_choice: str | Mapping[str, Any] | None = None
    parallel_tool_calls: bool | None = None

    def request(self, messages: Sequence[Message]) -> ChatRequest:
        """Return the chat request that asks for this; raise BadRequestError."""
        fields = {
            "messages": [dict(message) for message in messages],
            "temperature": self.temperature if self.do_sample else 0.0,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "seed": self.random_seed,
            "repetition_penalty": self.repetition_penalty,
            "max_tokens": self.max_new_tokens,
            "min_tokens": self.min_new_tokens,
            "stop": list(self.stop_words) or None,
            "stop_token_ids": list(self.stop_token_ids) or None,
            "ignore_eos": self.ignore_eos,
            "logprobs": self.logprobs is not None,
            "top_logprobs": self.logprobs,
            "response_format": self.response_format,
            "tools": None if self.tools is None else list(self.tools),
            "tool_choice": self.tool_choice,
            "parallel_tool_calls": self.parallel_tool_calls,
        }
        return read_record(fields, ChatRequest)


GenConfigs = GenerationConfig | Sequence[GenerationConfig]


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """An answer, or the next piece of one when streaming, which holds what is new.

    A tool call comes when it is whole.
    """

    text: str
    token_ids: tuple[int, ...]
    index: int  # which prompt this answers
    input_token_len: int
    generate_token_len: int
    finish_reason: str | None  # "stop", "length" or "tool_calls"; None while more comes
    logprobs: tuple[TokenLogprob, ...] | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    reasoning: str = ""


class Pipeline:
    """A loaded model. Use as a context manager, or call `close`; at exit of the program it ends by itself."""

    def __init__(self, engine: Engine, model: ServedModel) -> None:
        self._engine = engine
        self._model = model
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="lmdserve-prompt")
        self._serving = make_serving(engine, model, self._threads)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="lmdserve-pipeline", daemon=True)
        self._thread.start()
        asyncio.run_coroutine_threadsafe(engine.start(), self._loop).result()

    def __call__(
        self, prompts: Prompt | Sequence[Prompt], gen_config: GenConfigs | None = None
    ) -> Response | list[Response]:
        """Answer one prompt (a Response) or a list of prompts (a list in the same order), batched by the engine.

        `gen_config` is one for all prompts, or a list with one for each.
        """
        if _is_one_prompt(prompts):
            return self._answer_all([prompts], gen_config)[0]  # type: ignore[list-item]
        return self._answer_all(prompts, gen_config)  # type: ignore[arg-type]

    def stream_infer(
        self, prompts: Prompt | Sequence[Prompt], gen_config: GenConfigs | None = None
    ) -> Iterator[Response]:
        """Yield pieces of the answers as they come; `index` tells which prompt a piece belongs to."""
        pieces: queue.SimpleQueue[Response | BaseException | None] = queue.SimpleQueue()
        producer = self._start(_as_list(prompts), gen_config, pieces.put)
        try:
            while (piece := pieces.get()) is not None:
                if isinstance(piece, BaseException):
                    raise piece
                yield piece
        finally:
            producer.cancel()

    async def astream_infer(
        self, prompts: Prompt | Sequence[Prompt], gen_config: GenConfigs | None = None
    ) -> AsyncIterator[Response]:
        """`stream_infer` for asyncio programs: never blocks the caller's event loop."""
        caller = asyncio.get_running_loop()
        pieces: asyncio.Queue[Response | BaseException | None] = asyncio.Queue()

        def put(piece: Response | BaseException | None) -> None:
            caller.call_soon_threadsafe(pieces.put_nowait, piece)

        producer = self._start(_as_list(prompts), gen_config, put)
        try:
            while (piece := await pieces.get()) is not None:
                if isinstance(piece, BaseException):
                    raise piece
                yield piece
        finally:
            producer.cancel()

    async def ainfer(
        self, prompts: Prompt | Sequence[Prompt], gen_config: GenConfigs | None = None
    ) -> Response | list[Response]:
        """`pipe(...)` for asyncio programs."""
        answers = _fold([piece async for piece in self.astream_infer(prompts, gen_config)], len(_as_list(prompts)))
        return answers[0] if _is_one_prompt(prompts) else answers

    def close(self) -> None:
        """Stop the engine and its thread; running answers are ended. Closing twice is harmless."""
        if not self._thread.is_alive():
            return
        asyncio.run_coroutine_threadsafe(self._engine.stop(0.0), self._loop).result(CLOSE_TIMEOUT_S)
        self._serving.close()
        self._threads.shutdown(wait=False)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CLOSE_TIMEOUT_S)
        self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _answer_all(self, prompts: Sequence[Prompt], gen_config: GenConfigs | None) -> list[Response]:
        return _fold(list(self.stream_infer(prompts, gen_config)), len(prompts))

    def _start(
        self, prompts: Sequence[Prompt], gen_config: GenConfigs | None, put: Callable[[Any], None]
    ) -> Future[None]:
        configs = _one_for_each(gen_config, len(prompts))
        if not self._thread.is_alive():
            raise RuntimeError("this pipeline is closed; make a new one with lmdserve.pipeline")
        return asyncio.run_coroutine_threadsafe(self._produce(prompts, configs, put), self._loop)

    async def _produce(
        self,
        prompts: Sequence[Prompt],
        configs: Sequence[GenerationConfig],
        put: Callable[[Response | BaseException | None], None],
    ) -> None:
        """Generate all answers at once and hand each piece to `put`; then None, or the error that ended it."""
        try:
            async with asyncio.TaskGroup() as tasks:
                for index, (prompt, config) in enumerate(zip(prompts, configs, strict=True)):
                    tasks.create_task(self._produce_one(index, prompt, config, put))
        except BaseExceptionGroup as group:
            put(group.exceptions[0])
        else:
            put(None)

    async def _produce_one(
        self, index: int, prompt: Prompt, config: GenerationConfig, put: Callable[[Response], None]
    ) -> None:
        messages: Sequence[Message] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        (plan,) = await self._serving.planner.plan_chat(config.request(messages), f"pipeline-{uuid.uuid4().hex}")
        choice, check = ChoiceStream(plan, self._model.tokenizer), plan.new_check()
        calls = _Calls()
        chunks = cast("AsyncGenerator[Chunk, None]", self._engine.generate(plan.request))
        async with contextlib.aclosing(chunks):
            async for chunk in chunks:
                update = choice.feed(chunk)
                if check is not None:
                    update = await choice.checked(update, check)
                put(
                    Response(
                        text="".join(_text(event) for event in update.events),
                        reasoning="".join(event.text for event in update.events if isinstance(event, ReasoningDelta)),
                        tool_calls=calls.take(update.events),
                        token_ids=chunk.token_ids,
                        index=index,
                        input_token_len=choice.num_prompt_tokens,
                        generate_token_len=choice.num_completion_tokens,
                        finish_reason=update.finish_reason,
                        logprobs=chunk.logprobs,
                    )
                )
                if choice.is_over:
                    return


def pipeline(model: str = "demo", engine_config: EngineConfig | None = None, **options: Any) -> Pipeline:
    """Load `model` (folder, hub name or "demo") and return a Pipeline.

    `options` are the fields of EngineConfig, as in `pipeline("demo", quant_policy=8)`; or give an `engine_config`.
    Raises ConfigError when the model or an option is wrong.
    """
    prepare_torch()
    from lmdserve.engine.load_engine import load_engine
    from lmdserve.engine.model_folder import resolve_model_folder

    config = dataclasses.replace(engine_config or EngineConfig(), model=model, **options)
    folder = resolve_model_folder(config.model, config.revision)
    served = load_served_model(folder, name=model, chat_template=None)
    return Pipeline(load_engine(dataclasses.replace(config, model=str(folder))), served)


class _Calls:
    """Puts the calls of one answer together."""

    def __init__(self) -> None:
        self._begun: list[Event] = []  # what there is of the call on its way

    def take(self, events: Sequence[Event]) -> tuple[ToolCall, ...]:
        """Take the next events and return the calls that are whole with them."""
        whole: list[ToolCall] = []
        for event in events:
            if isinstance(event, ToolCallStart):
                self._begun = [event]
            elif isinstance(event, ToolCallArguments):
                self._begun.append(event)
            elif isinstance(event, ToolCallEnd):
                whole += fold([*self._begun, event]).tool_calls
        return tuple(whole)


def _text(event: Event) -> str:
    match event:
        case ContentDelta(text) | ToolCallAborted(_, text):
            return text
    return ""


def _one_for_each(gen_config: GenConfigs | None, num_prompts: int) -> Sequence[GenerationConfig]:
    if gen_config is None or isinstance(gen_config, GenerationConfig):
        return [gen_config or GenerationConfig()] * num_prompts
    if len(gen_config) != num_prompts:
        raise ValueError(
            f"gen_config has {len(gen_config)} configs for {num_prompts} prompts; give one, or one for each"
        )
    return gen_config


def _is_one_prompt(prompts: Prompt | Sequence[Prompt]) -> bool:
    if not isinstance(prompts, Sequence):
        raise TypeError(f"a prompt is a string or a list of messages; give one or a list of them, not {prompts!r:.60}")
    return isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], Mapping))


def _as_list(prompts: Prompt | Sequence[Prompt]) -> Sequence[Prompt]:
    return [prompts] if _is_one_prompt(prompts) else prompts  # type: ignore[list-item,return-value]


def _fold(pieces: Sequence[Response], num_prompts: int) -> list[Response]:
    """Join the pieces of each answer into one Response, in the order of the prompts."""
    by_index: list[list[Response]] = [[] for _ in range(num_prompts)]
    for piece in pieces:
        by_index[piece.index].append(piece)
    return [
        dataclasses.replace(
            parts[-1],
            text="".join(part.text for part in parts),
            reasoning="".join(part.reasoning for part in parts),
            tool_calls=tuple(itertools.chain.from_iterable(part.tool_calls for part in parts)),
            token_ids=tuple(itertools.chain.from_iterable(part.token_ids for part in parts)),
            logprobs=_join_logprobs(parts),
        )
        for parts in by_index
    ]


def _join_logprobs(parts: Sequence[Response]) -> tuple[TokenLogprob, ...] | None:
    known = [part.logprobs for part in parts if part.logprobs is not None]
    return tuple(itertools.chain.from_iterable(known)) if known else None
