"""A sequence's constraint between steps: the mask of its next token, and what to do when a constraint fails.

Owns when masks are computed: right after the token before them is known, while the device runs whatever else there is.
What may follow what is decided by whoever made the request; nothing a constraint raises gets beyond its own sequence.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from .api import TokenConstraint


@dataclass(slots=True)
class ConstraintState:
    """One sequence's constraint. Its methods are called on the engine thread."""

    constraint: TokenConstraint
    mask: bytes | None = None  # for the next token, once prepared; None: every token may come
    must_end: bool = False  # the mask allows tokens that end the sequence only
    is_over: bool = False
    failure: str | None = None
    _is_prepared: bool = False

    def prepare(self) -> None:
        """Compute the next token's mask, unless it is known."""
        if not self._is_prepared and self.failure is None and not self.is_over:
            self._is_prepared = True
            self._run(self._compute)

    def accept(self, token_ids: Iterable[int]) -> None:
        """Go on by the tokens of a step."""
        for token_id in token_ids:
            if self.failure is None and not self.is_over:
                self._is_prepared = False
                self._run(lambda token_id=token_id: self._take(token_id))  # type: ignore[misc]

    def _compute(self) -> None:
        self.must_end = self.constraint.must_end
        self.mask = self.constraint.mask()

    def _take(self, token_id: int) -> None:
        self.constraint.accept(token_id)
        self.is_over = self.constraint.is_over

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of native code is no Exception
            self.mask = None
            self.failure = f"this request's output format failed: {error}"
