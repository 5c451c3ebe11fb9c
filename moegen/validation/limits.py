"""An end to what takes too long, wherever it is: a busy machine must not make minutes of what was to take seconds."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


class OutOfTime(BaseException):
    """The time is over. No Exception, as a KeyboardInterrupt is none: nobody takes it for a failure of what was being done."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises `OutOfTime` inside once so many seconds are over; in the main thread only, elsewhere nothing ends early."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGALRM, _over)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _over(number: int, frame: Any) -> None:
    raise OutOfTime
