"""Ctrl-C, kill and hang-up: noticed even where a library loses them, and kept waiting where they would lose a process."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import Any, NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupts:
    """Notices Ctrl-C even where the compiler turns the KeyboardInterrupt into an error of its own; kill and hang-up likewise.

    Attributes:
        noticed: the signal's number, 0 before one came.
    """

    def __init__(self) -> None:
        self.noticed = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        with contextlib.suppress(ValueError):  # only the main thread may handle signals
            for number in SIGNALS:
                if signal.getsignal(number) != signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._notice)
        return self

    def _notice(self, number: int, frame: Any) -> NoReturn:
        self.noticed = number
        raise KeyboardInterrupt

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Raises the KeyboardInterrupt that was lost."""
        if self.noticed:
            raise KeyboardInterrupt


@contextlib.contextmanager
def waiting() -> Iterator[None]:
    """Interrupts wait until the block is over: what starts a process in it also knows how to end it."""
    came: list[tuple[int, Any]] = []
    previous: dict[int, Any] = {}
    with contextlib.suppress(ValueError):  # of another thread than the main one, which is not interrupted
        for wanted in SIGNALS:
            if callable(signal.getsignal(wanted)):
                previous[wanted] = signal.signal(wanted, lambda *seen: came.append(seen))
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        for seen in came[:1]:
            previous[seen[0]](*seen)
