"""The engine's contract with the rest of the house: requests in, chunks of token ids out, one tree of errors.

Standard library only: the HTTP layer and its tests import this without torch. Text never crosses this line; whoever
calls `generate` has already turned text into ids and turns ids back into text.
"""

import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal, NamedTuple, Protocol

ENGINE_THREAD_PREFIX = "lmdserve-engine"  # begins the name of the thread that runs the model


class FinishReason(Enum):
    """Why a sequence ended."""

    STOP = "stop"  # an end-of-sequence token or one of the request's stop_token_ids
    LENGTH = "length"  # max_tokens, or the model's context is full
    ABORT = "abort"  # the engine was told to stop it


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen; `temperature=0` is greedy, and defaults change nothing.

    Order of operations on a row of logits: logit_bias and penalties, min_tokens' ban of stop tokens, the constraint's
    mask, temperature, top_k, top_p, min_p, then one draw. Penalties follow their usual definitions: repetition_penalty
    (CTRL paper) counts prompt and output, presence and frequency penalties (OpenAI) count output only.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: no limit
    min_p: float = 0.0
    seed: int | None = None  # None: a fresh seed for this request
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    max_tokens: int = 512
    min_tokens: int = 0
    stop_token_ids: frozenset[int] = frozenset()  # beside the model's own end-of-sequence tokens
    ignore_eos: bool = False  # the model's own end-of-sequence tokens do not stop it
    num_logprobs: int | None = None  # None: no logprobs; n: the sampled token's and the n most likely ones'


class TokenConstraint(Protocol):
    """What one sequence's tokens have to obey, step by step: `mask`, a token, `accept`, `mask`, ...

    Called on threads of the engine, one at a time. What any of it raises fails that one request: a ValueError says that
    the request asks for too much, anything else is a bug.
    """

    @property
    def lock(self) -> threading.Lock:
        """What the engine holds while it calls anything below. Constraints that share state share their lock."""

    @property
    def is_over(self) -> bool:
        """Whether the last accepted token ends the sequence, whatever else does."""

    @property
    def must_end(self) -> bool:
        """Whether only tokens may come next that end the sequence."""

    def mask(self) -> bytes | bytearray | None:
        """Return the tokens that may come next, bit i of the bytes being token i, in words of 32; None: any.

        The next call may overwrite what it returns.
        """

    def accept(self, token_id: int) -> None:
        """Take the token that was sampled under the last mask."""

    def take_forced(self) -> Sequence[int]:
        """Return the tokens of which each is the only one that may come, as far as they are known, and accept them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One sequence to generate. `uid` is unique among live requests; `n` choices are n requests that share a prefix."""

    uid: str
    prompt_token_ids: Sequence[int]
    sampling: SamplingParams
    num_prompt_logprobs: int | None = None  # as num_logprobs, for every prompt token but the first
    deterministic: bool = False  # the same tokens, bit by bit, whatever is computed beside it
    constraint: TokenConstraint | None = None  # its own; it is used up by the sequence


class TokenLogprob(NamedTuple):
    """Natural-log probability of one token under the model's own distribution (before penalties and temperature)."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # the most likely (token_id, logprob), best first


class Chunk(NamedTuple):
    """What a sequence produced since the last chunk: tokens that came while the reader was busy arrive together.

    `token_ids` holds the stop token too when one ended the sequence. `logprobs` is parallel to `token_ids` when asked
    for. `prompt_logprobs` comes once, with the first chunk (None for the first prompt token). The last chunk, and only
    the last, has a finish_reason.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    num_cached_tokens: int = 0  # prompt tokens that came from the prefix cache
    finish_reason: FinishReason | None = None
    queued_s: float | None = None  # with the first chunk: how long the request waited for its first step


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """What a caller must know of the loaded model to form requests."""

    vocab_size: int
    session_len: int  # prompt plus output, tokens
    eos_token_ids: frozenset[int]
    planned_bytes: Mapping[str, int] = field(default_factory=dict)  # of memory, by what takes it
    num_kv_tokens: int = 0  # that the KV cache holds
    kv_bits: int = 16  # 8 or 4 where the KV cache is quantized
    weight_format: str = "hf"  # as `--model-format` names it


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """A snapshot for /metrics and /health; counters are totals since start."""

    num_running: int
    num_waiting: int
    num_total_blocks: int
    num_used_blocks: int  # held by running sequences
    num_cached_blocks: int  # free for use, but holding a reusable prefix
    prompt_tokens_total: int
    generation_tokens_total: int
    cached_tokens_total: int
    preemptions_total: int
    steps_total: int
    heartbeat_age_s: float  # since the loop last finished a step or slept with nothing to do
    drafted_tokens_total: int = 0  # guessed tokens that a step checked
    accepted_tokens_total: int = 0  # those that were right
    device_busy_s_total: float = 0.0  # in steps; 0 where it is not measured
    device_memory_bytes: int = 0  # that torch holds of the GPU's; 0 on a CPU
    device_idle_s_total: float = 0.0  # between the end of a step and the begin of one that was launched before that end


class SwapPlan(NamedTuple):
    """The memory before, during and after one checkpoint takes another's place, in bytes of the whole process."""

    how: Literal["beside", "drain"]  # loaded while the running one serves, or once that one is done and gone
    reason: str  # one sentence
    running_bytes: int
    peak_bytes: int
    after_bytes: int
    running_kv_tokens: int
    after_kv_tokens: int
    session_len: int  # of the new checkpoint


class Engine(Protocol):
    """The engine as the HTTP layer sees it. All methods are called on the event loop."""

    info: EngineInfo

    async def start(self) -> None:
        """Start the batching loop; requests are accepted from here on."""

    async def stop(self, timeout_s: float) -> None:
        """Refuse new requests, let running ones finish for up to `timeout_s`, abort the rest, free everything."""

    def release(self) -> None:
        """Give the memory of weights and KV cache back, after `stop`; nothing but `info` is of use afterwards.

        May be called on any thread: it can take a while.
        """

    def generate(self, request: Request) -> AsyncIterator[Chunk]:
        """Yield chunks until one has a finish_reason. Closing the iterator early aborts the sequence.

        Raises InvalidRequestError, ContextTooLongError, QueueFullError, EngineDrainingError or EngineDeadError, before
        the first chunk where that can be known.
        """

    def stats(self) -> EngineStats:
        """Return the current counters; cheap enough for every scrape."""

    def check_health(self) -> None:
        """Return when the loop is alive and moving; raise EngineDeadError with the reason when it is not."""


class EngineError(Exception):
    """Base of everything the engine raises on purpose; the text is one sentence fit for a user."""


class ConfigError(EngineError):
    """A start-up problem: what is wrong with the options or the model folder, and what to change."""


class InvalidRequestError(EngineError):
    """A request field the engine cannot honour; `param` names it in the API's terms."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ContextTooLongError(InvalidRequestError):
    """The prompt leaves no room for an answer."""

    def __init__(self, num_prompt_tokens: int, session_len: int) -> None:
        super().__init__(
            f"the prompt has {num_prompt_tokens} tokens, and this model's maximum context length is {session_len} "
            "tokens for prompt and answer together; shorten the prompt",
            param="messages",
        )
        self.num_prompt_tokens = num_prompt_tokens
        self.session_len = session_len


class FormatFailedError(EngineError):
    """What the request's constraint asks for turned out to be impossible, or too costly, while it was followed."""


class QueueFullError(EngineError):
    """Too many requests are waiting; try again after `retry_after_s`."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EngineDrainingError(EngineError):
    """The engine is shutting down and takes no new requests."""


class EngineDeadError(EngineError):
    """The engine loop failed or hangs; only a restart helps."""
