"""What a benchmark sends: prompts of a wanted length, when each arrives, and which clients leave early.

All of it follows from the seed, and is made before the clock starts. Without a tokenizer, the length of a prompt is set
in words; how many tokens a word costs is asked of the server once (`Calibration`).
"""

import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .settings import SettingError
from .wire import Json

# Frequent words, which most vocabularies hold as one token each.
_FREQUENT_WORDS = (
    "time year people way day man thing woman life child world school state family student group country problem hand "
    "part place case week company system program question work government number night point home water room mother "
    "area money story fact month lot right study book eye job word business issue side kind head house service friend "
    "father power hour game line end member law car city community name president team minute idea body information "
    "back parent face others level office door health person art war history party result change morning reason "
    "research girl guy moment air teacher force education"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """One benchmark: the same for every level of concurrency."""

    model: str
    endpoint: str = "chat"  # or "completions"
    num_prompts: int = 50
    input_len: int = 128
    output_len: int = 128
    range_ratio: float = 0.0  # lengths vary by this share to both sides
    dataset_path: Path | None = None
    request_rate: float = math.inf  # requests per second, on average; inf: as fast as the concurrency allows
    disconnect_share: float = 0.0
    ignore_eos: bool = False
    temperature: float = 0.0
    seed: int = 0
    max_duration_s: float = 600.0  # of one level
    request_timeout_s: float = 300.0


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """One request before it is sent."""

    payload: Json
    arrival_s: float = 0.0  # after the start of the level
    leave_after_chunks: int | None = None  # None: a client that stays to the end


@dataclass(frozen=True, slots=True)
class Calibration:
    """The server's own count for random words: tokens = overhead + words * tokens_per_word."""

    overhead_tokens: float
    tokens_per_word: float

    @classmethod
    def from_counts(cls, short: tuple[int, int], long: tuple[int, int]) -> "Calibration":
        """Draw the line through two (words, tokens) pairs."""
        tokens_per_word = (long[1] - short[1]) / (long[0] - short[0])
        if tokens_per_word <= 0:
            raise SettingError(
                f"the server counts {long[1]} tokens for {long[0]} words and {short[1]} for {short[0]}: prompt lengths "
                "cannot be set; give prompts with --dataset"
            )
        return cls(short[1] - short[0] * tokens_per_word, tokens_per_word)

    def num_words(self, num_tokens: int) -> int:
        """Return how many words make a prompt of about `num_tokens`; at least one."""
        return max(1, round((num_tokens - self.overhead_tokens) / self.tokens_per_word))


def random_words(num_words: int, rng: random.Random) -> str:
    """Return a prompt whose first words differ from every other's, so that no prefix cache can help."""
    return " ".join(rng.choices(_FREQUENT_WORDS.split(), k=num_words))


def calibration_prompts() -> list[tuple[int, str]]:
    """Return number of words and text of two prompts with every word equally often, so that the mean is exact."""
    words = _FREQUENT_WORDS.split()
    return [(len(words) * times, " ".join(words * times)) for times in (1, 2)]


def make_payload(prompt: str | list[Json], *, max_tokens: int, options: BenchOptions) -> Json:
    """Return the body of a request; a text becomes a user's message where the endpoint wants messages."""
    payload: Json = {
        "model": options.model,
        "max_tokens": max_tokens,
        "temperature": options.temperature,
        "stream_options": {"include_usage": True},
    }
    if options.ignore_eos:
        payload["ignore_eos"] = True
    if options.endpoint == "completions":
        return payload | {"prompt": prompt}
    messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    return payload | {"messages": messages}


def plan_level(options: BenchOptions, level: int, calibration: Calibration | None) -> list[PlannedRequest]:
    """Return the requests of one level. Levels differ in their random prompts, so one does not warm the cache of the
    next; `calibration` is not needed with a dataset.
    """
    rng = random.Random(f"{options.seed}/{level}")
    prompts = _dataset_prompts(options) if calibration is None else _random_prompts(options, calibration, rng)
    requests, arrival_s = [], 0.0
    for _, (prompt, max_tokens) in zip(range(options.num_prompts), prompts, strict=False):
        is_leaving = rng.random() < options.disconnect_share
        requests.append(
            PlannedRequest(
                payload=make_payload(prompt, max_tokens=max_tokens, options=options),
                arrival_s=arrival_s,
                leave_after_chunks=rng.randint(1, max(1, max_tokens // 2)) if is_leaving else None,
            )
        )
        if options.request_rate < math.inf:
            arrival_s += rng.expovariate(options.request_rate)
    return requests


def _random_prompts(
    options: BenchOptions, calibration: Calibration, rng: random.Random
) -> Iterator[tuple[str | list[Json], int]]:
    while True:
        input_len = _around(options.input_len, options.range_ratio, rng)
        text = random_words(calibration.num_words(input_len), rng)
        yield text, _around(options.output_len, options.range_ratio, rng)


def _around(length: int, ratio: float, rng: random.Random) -> int:
    return max(1, rng.randint(math.floor(length * (1 - ratio)), math.ceil(length * (1 + ratio))))


def _dataset_prompts(options: BenchOptions) -> Iterator[tuple[str | list[Json], int]]:
    """Yield the lines of the dataset, from the start again when they are used up."""
    assert options.dataset_path is not None
    lines = read_dataset(options.dataset_path, options)
    while True:
        yield from lines


def read_dataset(path: Path, options: BenchOptions) -> list[tuple[str | list[Json], int]]:
    """Return prompt and output length of each line: JSON with `prompt` or `messages`, and `max_tokens` if wanted."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingError(f"cannot read {path}: {error}") from None
    found = [
        _dataset_line(line, f"{path}, line {number}", options)
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not found:
        raise SettingError(f"{path} holds no prompts")
    return found


def _dataset_line(line: str, where: str, options: BenchOptions) -> tuple[str | list[Json], int]:
    try:
        record: Any = json.loads(line)
    except ValueError as error:
        raise SettingError(f"{where} is not valid JSON: {error}") from None
    if not isinstance(record, dict):
        raise SettingError(f"{where} is not a JSON object")
    prompt = record.get("prompt") if options.endpoint == "completions" else record.get("messages", record.get("prompt"))
    if not isinstance(prompt, str if options.endpoint == "completions" else str | list) or not prompt:
        wanted = "`prompt`" if options.endpoint == "completions" else "`messages` or `prompt`"
        raise SettingError(f"{where} has no {wanted}")
    max_tokens = record.get("max_tokens", options.output_len)
    if not isinstance(max_tokens, int) or isinstance(max_tokens, bool) or max_tokens < 1:
        raise SettingError(f"{where}: max_tokens is {max_tokens!r}, not a whole number above 0")
    return prompt, max_tokens
