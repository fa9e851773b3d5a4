"""An engine without a model: every token is drawn at random from what the request's constraint allows.

It stands for a model with random weights at temperature 1, with a taste: control tokens that open calls, and characters
that end strings, numbers and arrays, are drawn more often than others, so that answers come to an end.
"""

import random
from collections.abc import AsyncIterator, Collection

from server_fakes import FakeEngine

from lmdserve.engine.api import Chunk, EngineInfo, FinishReason, Request

NUM_BYTES = 256
FAVOURITES = frozenset(b'"]},: \n0123456789truefalsnabcdefgh')


class SamplingEngine(FakeEngine):
    """Draws tokens; what the constraint does not allow is never drawn, and nothing else is known of it.

    `opener` are the bytes that open a call where no control token does: they are written now and then.
    """

    def __init__(self, vocab_size: int, end_ids: Collection[int], *, seed: int = 0, opener: bytes = b"") -> None:
        super().__init__()
        self._opener = opener
        self.info = EngineInfo(vocab_size=vocab_size, session_len=1 << 20, eos_token_ids=frozenset(end_ids))
        self._random = random.Random(seed)

    async def generate(self, request: Request) -> AsyncIterator[Chunk]:
        self.requests.append(request)
        ends = request.sampling.stop_token_ids | self.info.eos_token_ids
        constraint = request.constraint
        due: list[int] = []  # the rest of an opener that was begun
        for position in range(request.sampling.max_tokens):
            mask = None if constraint is None else constraint.mask()
            if not due and self._random.random() < 0.02:
                due = list(self._opener)
            token_id = due.pop(0) if due and _allows(mask, due[0]) else self._draw(mask)
            if constraint is not None:
                constraint.accept(token_id)
            is_over = token_id in ends or (constraint is not None and constraint.is_over)
            is_last = is_over or position + 1 == request.sampling.max_tokens
            reason = FinishReason.STOP if is_over else FinishReason.LENGTH if is_last else None
            yield Chunk((token_id,), None, None, 0, reason)
            if is_last:
                return

    def _draw(self, mask: bytes | None) -> int:
        allowed = [token_id for token_id in range(self.info.vocab_size) if _allows(mask, token_id)]
        assert allowed, "the constraint allows nothing"
        control = [token_id for token_id in allowed if token_id >= NUM_BYTES]
        favourites = [token_id for token_id in allowed if token_id in FAVOURITES]
        pools = [pool for pool, share in ((control, 0.15), (favourites, 0.8)) if pool and self._random.random() < share]
        return self._random.choice(pools[0] if pools else allowed)


def _allows(mask: bytes | None, token_id: int) -> bool:
    return mask is None or bool(mask[token_id // 8] >> token_id % 8 & 1)
