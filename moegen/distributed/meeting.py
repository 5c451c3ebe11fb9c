"""What ranks tell one another through torch.distributed's store: it works before there are connections, and after they broke."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from ..errors import DistributedError

_POLL_SECONDS = 0.02
_STORE_SECONDS = 5.0  # within which a store answers that is not dead

Answer = TypeVar("Answer")


class Meeting:
    """A place where each rank leaves notes that all can read.

    Args:
        name: the same on all ranks, and no other meeting's.
        store: a store that all ranks have, and nobody else uses.
        rank, size: of this process among them.
    """

    def __init__(self, name: str, store: Any, rank: int, size: int) -> None:
        self.name, self.store, self.rank, self.size = name, store, rank, size

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

    def read(self, topic: str) -> dict[int, str]:
        """The notes that are there on a topic, by rank.

        Raises:
            DistributedError: the store does not answer.
        """
        return {rank: self._read(f"{topic}/{rank}") for rank in sorted(self._present(topic, set(range(self.size))))}

    def leave(self, topic: str, note: str) -> None:
        """Leaves a note of this rank on a topic.

        Raises:
            DistributedError: the store does not answer.
        """
        _answer(lambda: self.store.set(f"{topic}/{self.rank}", note))

    def agree(
        self, topic: str, description: Mapping[str, Any], problem: BaseException | None, timeout_s: float, says: str = ""
    ) -> list[str]:
        """Waits for all ranks to be ready, and checks that they mean the same; returns what each `says` besides.

        Args:
            description: what has to be the same on every rank.
            problem: why this rank cannot take part; it is raised here, and the others hear of it.
            timeout_s: seconds to wait for ranks that are not ready yet.

        Raises:
            DistributedError: ranks are missing, cannot take part, or disagree.
        """
        mine = {"problem": described(problem), "is": dict(description), "says": says}
        notes = self.gather(topic, json.dumps(mine), timeout_s)
        if problem is not None:
            raise problem
        if missing := [rank for rank, note in enumerate(notes) if note is None]:
            names = ", ".join(map(str, missing))
            raise DistributedError(f"rank {names} of {self.size} did not begin within start_timeout_s={timeout_s:g}", missing)
        said: list[dict[str, Any]] = [json.loads(note or "") for note in notes]
        if failed := [rank for rank, note in enumerate(said) if note["problem"]]:
            raise DistributedError("; ".join(f"rank {rank} failed: {said[rank]['problem']}" for rank in failed), failed)
        _check_same([note["is"] for note in said])
        return [note["says"] for note in said]

    def _present(self, topic: str, ranks: set[int]) -> set[int]:
        return _answer(lambda: {rank for rank in ranks if self.store.check([f"{topic}/{rank}"])})

    def _read(self, key: str) -> str:
        return str(_answer(lambda: bytes(self.store.get(key))).decode())


def described(error: BaseException | None) -> str:
    """An error as other ranks get to read it; nothing for none."""
    return "" if error is None else f"{type(error).__name__}: {str(error).strip() or 'no message'}"


def _check_same(descriptions: Sequence[Mapping[str, Any]]) -> None:
    first = descriptions[0]
    for rank, other in enumerate(descriptions):
        for name in [*first, *other]:
            a, b = first.get(name), other.get(name)
            if a != b:
                raise DistributedError(f"ranks disagree: {name} is {a!r} on rank 0 and {b!r} on rank {rank}", (0, rank))


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
