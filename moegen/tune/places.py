"""Places that measure a candidate beside the default: this machine, or others.

A job is plain JSON, so that any machine can carry it out:

    artifacts   folders of the default and of the candidate
    workload    folders, one for each routing
    tokens      numbers of tokens; each is measured with each workload
    threads, rounds, min_ms, copies    as in `moegen.tune.worker`

and so is its result: `points`, each with `workload` and `tokens`, `relative_l2` and `seconds` of the default and of the candidate,
the latter with one sample for each round. A candidate beyond the bounds has no samples.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import queue
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from ..errors import CandidateError, MeasureError, PlaceLost
from . import kinds
from .measurers import Measurer
from .processes import run_module

_TICK_SECONDS = 0.1
Job = Mapping[str, Any]


class Place(Protocol):
    """Somewhere to measure."""

    def measurer(self, target: str, arch: str) -> Measurer:
        """What measures there.

        Args:
            target: a target's slug, or `cuda` or `llvm`.
            arch: architecture of the machine.

        Raises:
            PlaceLost: the place is gone.
            TargetError, MeasureError: there is nothing that could measure.
        """

    def measure(self, job: Job) -> dict[str, Any]:
        """Carries out a job.

        Raises:
            CandidateError: the candidate crashes or hangs.
            PlaceLost: the place is gone.
            MeasureError: the job cannot be done here, whatever the candidate.
        """

    def close(self) -> None:
        """Frees what is held for further jobs."""


class Here:
    """This machine, as a place.

    Args:
        folder: for files of its own.
        limit_seconds: a measurement that takes longer is a hang.
        worker: the module of this package that measures.
    """

    def __init__(self, folder: pathlib.Path, limit_seconds: float = 120.0, worker: str = "worker") -> None:
        self.folder, self.limit_seconds, self.worker = folder, limit_seconds, worker

    def measurer(self, target: str, arch: str) -> Measurer:
        """As `Place.measurer`."""
        return kinds.of(target).here()

    def measure(self, job: Job) -> dict[str, Any]:
        """As `Place.measure`; the worker is a process of its own."""
        asked, answer = self.folder / "job.json", self.folder / "result.json"
        asked.write_text(json.dumps(job), encoding="utf-8")
        answer.unlink(missing_ok=True)
        run_module(self.worker, [str(asked), str(answer)], self.limit_seconds, self.folder / "worker.log")
        try:
            found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise CandidateError("it ended without a result", "runtime") from None
        return found

    def close(self) -> None:
        """Nothing is held."""


class Places:
    """Several places that measure at the same time. A place that is lost is asked no more; its job goes to another one, once.

    The last place that is left is asked again itself: a server may have become free again after its line was cut.

    Args:
        places: at least one.
    """

    def __init__(self, places: Sequence[Place]) -> None:
        self._all = list(places)
        self._free: queue.SimpleQueue[Place] = queue.SimpleQueue()
        for place in places:
            self._free.put(place)
        self._lock = threading.Lock()
        self.count = len(places)
        self._lost: PlaceLost | None = None

    def measure(self, job: Job) -> dict[str, Any]:
        """As `Place.measure`, at the first place that is free.

        Raises:
            MeasureError: no place is left.
        """
        before: Place | None = None
        while True:
            place = self._take()
            try:
                found = place.measure(job)
            except PlaceLost as error:
                self._lose(place, error, again=before is None)
                if before not in (None, place):
                    raise CandidateError(f"two places were lost with it: {error}", "runtime") from error
                before = place
                continue
            except BaseException:
                self._free.put(place)
                raise
            self._free.put(place)
            return found

    def close(self) -> None:
        """Closes all of them."""
        for place in self._all:
            place.close()

    def _lose(self, place: Place, error: PlaceLost, again: bool) -> None:
        with self._lock:
            self._lost = error
            if again and self.count == 1:
                self._free.put(place)
            else:
                self.count -= 1

    def _take(self) -> Place:
        while True:
            with self._lock:
                if not self.count:
                    raise MeasureError(
                        f"no place to measure at is left ({self._lost}): start servers again, and run the same command to go on"
                    )
            with contextlib.suppress(queue.Empty):
                return self._free.get(timeout=_TICK_SECONDS)


def measurer_of(places: Sequence[Place], target: str, arch: str) -> Measurer:
    """What measures at the first place that answers; arguments as of `Place.measurer`.

    Raises:
        PlaceLost: none does.
        TargetError, MeasureError: there is nothing that could measure.
    """
    for place in places[:-1]:
        with contextlib.suppress(PlaceLost):
            return place.measurer(target, arch)
    return places[-1].measurer(target, arch)
