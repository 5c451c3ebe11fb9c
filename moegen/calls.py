"""Counting the calls of a library that are under way, so that nothing they use is freed under them."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import Any


class Calls:
    """The calls under way. A process that ends waits for those of its daemon threads, and lets them begin no other:
    the thread pools that they use are freed then."""

    def __init__(self) -> None:
        self._closed = False
        self._running: set[int] = set()
        self._pid = os.getpid()

    def counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, whose calls are counted."""
        running, identity = self._running, threading.get_ident

        def call(*arguments: Any) -> Any:
            me = identity()
            running.add(me)
            try:
                if self._closed:
                    running.discard(me)
                    threading.Event().wait()  # in a daemon thread, while the process ends
                return function(*arguments)
            finally:
                running.discard(me)

        return call

    def close(self) -> None:
        """Waits until no call is under way; in a forked child there never was one."""
        self._closed = True
        while self._running and os.getpid() == self._pid:
            time.sleep(0.001)
