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

    Tokens are bytes, with control tokens behind them, unless `favourites` and `control_ids` say otherwise. `opener` are
    the bytes that open a call where no control token does: they are written now and then.
    """

    def __init__(
        self,
        vocab_size: int,
        end_ids: Collection[int],
        *,
        seed: int = 0,
        opener: bytes = b"",
        favourites: Collection[int] = FAVOURITES,
        control_ids: Collection[int] | None = None,
    ) -> None:
        super().__init__()
        self._opener = opener
        self._all = (1 << vocab_size) - 1
        self._favourites = sum(1 << token_id for token_id in favourites)
        self._control = sum(1 << i for i in (range(NUM_BYTES, vocab_size) if control_ids is None else control_ids))
        self.info = EngineInfo(vocab_size=vocab_size, session_len=1 << 20, eos_token_ids=frozenset(end_ids))
        self._random = random.Random(seed)

    async def generate(self, request: Request) -> AsyncIterator[Chunk]:
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
        allowed = self._all if mask is None else int.from_bytes(mask, "little") & self._all
        assert allowed, "the constraint allows nothing"
        for liked, share in ((self._control & allowed, 0.15), (self._favourites & allowed, 0.8)):
            if liked and self._random.random() < share:
                return self._draw_from(liked)
        return self._draw_from(allowed)

    def _draw_from(self, bits: int) -> int:
        """Return one of few set bits, each as likely; of many the first behind a random place."""
        if bits.bit_count() <= NUM_BYTES:
            for _ in range(self._random.randrange(bits.bit_count())):
                bits &= bits - 1
        else:
            bits &= -1 << self._random.randrange(bits.bit_length())
        return (bits & -bits).bit_length() - 1


def _allows(mask: bytes | None, token_id: int) -> bool:
    return mask is None or bool(mask[token_id // 8] >> token_id % 8 & 1)
