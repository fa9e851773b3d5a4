"""Endless training batches: processes that write fresh dialogues, tokenize them and pack them into rows.

Every row is made of dialogues never used before; a seed gives the same dialogues each time, in rows whose order depends
on which process was faster.
"""

import multiprocessing
from array import array
from collections.abc import Iterator
from multiprocessing.queues import Queue
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor

from .corpus.dialogue import render
from .corpus.mixture import make_dialogue
from .corpus.source import Source, Split

ROW_TOKENS = 16_384
MEAN_DOCUMENT_TOKENS = 64  # far below the real mean, so that all batches have one shape and compile once
BOS, EOS = 1, 2
PROMPT, ANSWER = 0, 1  # what a token is: read, or to be written by the model


class Batch(NamedTuple):
    """Packed documents; see network.py for what the fields mean. `roles` is PROMPT or ANSWER for each token."""

    token_ids: Tensor  # int64 [num_tokens]
    roles: Tensor  # int64 [num_tokens]
    positions: Tensor  # int64 [num_tokens]
    starts: Tensor  # int32 [max_documents + 1], padded with num_tokens


class Markers(NamedTuple):
    """Ids that say where the model's own turns begin and end."""

    im_start: int
    im_end: int
    assistant: tuple[int, ...]  # "assistant\n"

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "Markers":
        assistant = tuple(tokenizer.encode("assistant\n", add_special_tokens=False).ids)
        im_start, im_end = (tokenizer.token_to_id(token) for token in ("<|im_start|>", "<|im_end|>"))
        if im_start is None or im_end is None:
            raise ValueError("the tokenizer lacks InternLM2's control tokens; make it with demo/tokenizer.py")
        return cls(im_start, im_end, assistant)


def roles_of(token_ids: list[int], markers: Markers) -> list[int]:
    """Mark the tokens the model has to write: assistant turns with their end, or all of a plain text."""
    if markers.im_start not in token_ids:
        return [PROMPT] + [ANSWER] * (len(token_ids) - 1)
    roles = [PROMPT] * len(token_ids)
    position = 0
    while True:
        try:
            position = token_ids.index(markers.im_start, position) + 1
        except ValueError:
            return roles
        begin = position + len(markers.assistant)
        if tuple(token_ids[position:begin]) == markers.assistant:
            end = token_ids.index(markers.im_end, begin) + 1
            roles[begin:end] = [ANSWER] * (end - begin)


def write_rows(queue: "Queue[tuple[bytes, bytes]]", tokenizer_path: str, seed: int, longest: int) -> None:
    """Fill the queue with rows for ever: token ids and roles, as bytes of uint16 and uint8."""
    tokenizer = Tokenizer.from_file(tokenizer_path)
    tokenizer.no_padding()
    markers = Markers.of(tokenizer)
    source = Source(seed, Split.TRAIN)
    ids: list[int] = []
    roles: list[int] = []
    while True:
        encoded = tokenizer.encode(render(make_dialogue(source)), add_special_tokens=False).ids
        if len(encoded) > longest:
            continue
        if len(ids) + len(encoded) > ROW_TOKENS:
            padding = ROW_TOKENS - len(ids)
            filler = ([BOS] + [EOS] * padding)[:padding]
            queue.put((array("H", ids + filler).tobytes(), bytes(roles + [PROMPT] * padding)))
            ids, roles = [], []
        ids += encoded
        roles += roles_of(encoded, markers)


class BatchStream:
    """Owns the writing processes; `close` ends them."""

    def __init__(self, tokenizer_path: Path, *, num_workers: int, seed: int, longest: int, rows_per_batch: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._queue: Queue[tuple[bytes, bytes]] = context.Queue(maxsize=512)
        self._rows_per_batch = rows_per_batch
        self._workers = [
            context.Process(
                target=write_rows, args=(self._queue, str(tokenizer_path), seed * 1000 + index, longest), daemon=True
            )
            for index in range(num_workers)
        ]
        for worker in self._workers:
            worker.start()

    def __iter__(self) -> Iterator[Batch]:
        while True:
            rows = [self._queue.get() for _ in range(self._rows_per_batch)]
            yield pack(rows)

    def num_waiting_rows(self) -> int:
        """Return how many rows wait to be used; near zero, training waits for text."""
        return self._queue.qsize()

    def close(self) -> None:
        for worker in self._workers:
            worker.terminate()


def pack(rows: list[tuple[bytes, bytes]]) -> Batch:
    """Join rows into one batch with positions and document starts."""
    token_ids = torch.frombuffer(bytearray(b"".join(ids for ids, _ in rows)), dtype=torch.uint16).long()
    roles = torch.frombuffer(bytearray(b"".join(roles for _, roles in rows)), dtype=torch.uint8).long()
    num_tokens = token_ids.numel()
    begins = (token_ids == BOS).nonzero()[:, 0]
    lengths = torch.diff(begins, append=torch.tensor([num_tokens]))
    positions = torch.arange(num_tokens) - begins.repeat_interleave(lengths)
    num_starts = max(num_tokens // MEAN_DOCUMENT_TOKENS, begins.numel()) + 1
    starts = torch.full((num_starts,), num_tokens, dtype=torch.int32)
    starts[: begins.numel()] = begins.int()
    return Batch(token_ids, roles, positions, starts)
