"""The time that a run has, and what a cell will probably take of it."""

from __future__ import annotations

import time
from collections.abc import Callable

_UNSEEN_SECONDS = 12.0
_SAFETY = 1.3


class Budget:
    """Seconds that are left.

    Args:
        seconds: of the whole.
        clock: seconds since some moment.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._end = clock() + seconds
        self._seen: dict[int, float] = {}

    @property
    def left(self) -> float:
        """Seconds; 0 at least."""
        return max(0.0, self._end - self._clock())

    def took(self, tokens: int, seconds: float) -> None:
        """A cell of so many tokens took so long."""
        self._seen[tokens] = max(self._seen.get(tokens, 0.0), seconds)

    def expected(self, tokens: int) -> float:
        """Seconds that a cell of so many tokens may take: the longest of that size so far, or of what is nearest, and some more."""
        if not self._seen:
            return _UNSEEN_SECONDS
        nearest = min(self._seen, key=lambda seen: (abs(seen.bit_length() - tokens.bit_length()), seen))
        return _SAFETY * self._seen[nearest]

    def allows(self, tokens: int) -> bool:
        """Whether a cell of so many tokens probably fits."""
        return self.expected(tokens) <= self.left
