"""What a reader finds, and that readers are woken a few at a time."""

import asyncio
from typing import Any

from lmdserve.engine.api import Chunk, EngineInfo, FinishReason, Request, SamplingParams
from lmdserve.engine.scheduler import Progress
from lmdserve.engine.sequence import Sequence, new_sequence
from lmdserve.engine.step import ChunkResult
from lmdserve.engine.stream import READERS_PER_TURN, OutputStream, Wakeups

INFO = EngineInfo(vocab_size=64, session_len=1000, eos_token_ids=frozenset())


def _sequence(**sampling: Any) -> Sequence:
    request = Request(uid="a", prompt_token_ids=[1], sampling=SamplingParams(**sampling))
    return new_sequence(request, info=INFO, rope_base_for=lambda n: 1e4)


def _put(stream: OutputStream, sequence: Sequence, *token_ids: int) -> None:
    stream.put(Progress(sequence, ChunkResult(token_ids)))


async def test_what_came_before_a_reader_asks_is_handed_over_at_once_without_waking() -> None:
    sequence = _sequence()
    stream = OutputStream(sequence)
    _put(stream, sequence, 5)
    _put(stream, sequence, 6, 7)
    assert (await stream.next_chunk()).token_ids == (5, 6, 7)
    assert not stream.has_news


async def test_a_step_that_brings_no_token_is_no_news() -> None:
    sequence = _sequence()
    stream = OutputStream(sequence)
    _put(stream, sequence)
    assert not stream.has_news
    sequence.finish_reason = FinishReason.LENGTH
    _put(stream, sequence)
    assert (await stream.next_chunk()).finish_reason is FinishReason.LENGTH


async def test_the_time_in_the_queue_comes_once() -> None:
    sequence = _sequence()
    stream = OutputStream(sequence)
    await asyncio.sleep(0.01)
    stream.note_admission()
    chunks = []
    for token_id in (5, 6):
        _put(stream, sequence, token_id)
        chunks.append(await stream.next_chunk())
    assert chunks[0].queued_s is not None
    assert 0.005 < chunks[0].queued_s < 1.0
    assert chunks[1].queued_s is None


async def test_readers_are_woken_a_few_at_a_time_and_find_what_came_meanwhile() -> None:
    sequence = _sequence()
    wakeups = Wakeups()
    streams = [OutputStream(sequence) for _ in range(3 * READERS_PER_TURN)]
    received: list[Chunk] = []

    async def read(stream: OutputStream) -> None:
        received.append(await stream.next_chunk())

    readers = [asyncio.create_task(read(stream)) for stream in streams]
    await asyncio.sleep(0)
    for stream in streams:
        _put(stream, sequence, 1)
        wakeups.add(stream)
    counts = []
    while len(received) < len(streams):
        await asyncio.sleep(0)
        counts.append(len(received))
        if len(counts) == 1:  # the next step is back before most readers have had their turn
            for stream in streams:
                _put(stream, sequence, 2)
                wakeups.add(stream)
    steps = [after - before for before, after in zip([0, *counts], counts, strict=False)]
    assert max(steps) <= READERS_PER_TURN, "an iteration of the event loop wakes a few readers only"
    bundled = sum(chunk.token_ids == (1, 2) for chunk in received)
    assert bundled >= 2 * READERS_PER_TURN
    await asyncio.gather(*readers)
