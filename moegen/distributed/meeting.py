"""What ranks tell one another through torch.distributed's store: it works before there are connections, and after they broke."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from ..errors import DistributedError

_POLL_SECONDS = 0.02
_STORE_SECONDS = 5.0  # within which a store answers that is not dead

Answer = TypeVar("Answer")


class Meeting:
    """A place where each rank leaves notes that all can read.

    Args:
        store: a store that all ranks have, and nobody else uses.
        rank, size: of this process among them.
    """

    def __init__(self, store: Any, rank: int, size: int) -> None:
        self.store, self.rank, self.size = store, rank, size

    def gather(self, topic: str, note: str, timeout_s: float) -> list[str | None]:
        """The notes of all ranks on a topic; None of those that left none in time.

        Raises:
            DistributedError: the store does not answer.
        """
        self.leave(topic, note)
        missing = set(range(self.size))
        deadline = time.monotonic() + timeout_s
        while True:
            missing -= self._present(topic, missing)
            if not missing or time.monotonic() > deadline:
                break
            time.sleep(_POLL_SECONDS)
        return [None if rank in missing else self._read(f"{topic}/{rank}") for rank in range(self.size)]

    def leave(self, topic: str, note: str) -> None:
        """Leaves a note of this rank on a topic.

        Raises:
            DistributedError: the store does not answer.
        """
        _answer(lambda: self.store.set(f"{topic}/{self.rank}", note))

    def _present(self, topic: str, ranks: set[int]) -> set[int]:
        return _answer(lambda: {rank for rank in ranks if self.store.check([f"{topic}/{rank}"])})

    def _read(self, key: str) -> str:
        return str(_answer(lambda: bytes(self.store.get(key))).decode())


def _answer(ask: Callable[[], Answer]) -> Answer:
    """What the store says. It is asked in a thread: a store whose process was stopped never answers."""
    said: list[Answer] = []
    failed: list[BaseException] = []

    def work() -> None:
        try:
            said.append(ask())
        except Exception as error:  # torch's own, of many kinds
            failed.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(_STORE_SECONDS)
    if said:
        return said[0]
    reason = str(failed[0]).splitlines()[0] if failed else f"it did not answer within {_STORE_SECONDS:g} s"
    raise DistributedError(f"the store of torch.distributed, which a rank may have held, is gone: {reason}")
