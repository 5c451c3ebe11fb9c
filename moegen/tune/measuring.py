"""Measuring a candidate beside the default, in processes of their own, and what the times say.

A job is plain JSON, so that any machine can carry it out:

    artifacts   folders of the default and of the candidate
    workload    folders, one for each routing
    tokens      numbers of tokens; each is measured with each workload
    threads, rounds, min_ms, copies    as in `moegen.tune.worker`

and so is its result: `points`, each with `workload` and `tokens`, `relative_l2` and `seconds` of the default and of the candidate,
the latter with one sample for each round. A candidate beyond the bounds has no samples.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import json
import math
import os
import pathlib
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from ..bench.workload import RELATIVE_L2
from ..errors import CandidateError, MeasureError, PlaceLost
from ..paths import PACKAGE

_RESAMPLES = 1000
_TICK_SECONDS = 0.1
_BAND_PERCENT = (2.5, 97.5)
Job = Mapping[str, Any]
Item = TypeVar("Item")
Result = TypeVar("Result")


class Place(Protocol):
    """Somewhere to measure."""

    def measure(self, job: Job) -> dict[str, Any]:
        """Carries out a job.

        Raises:
            CandidateError: the candidate crashes or hangs.
            PlaceLost: the place is gone.
            MeasureError: the job cannot be done here, whatever the candidate.
        """

    def close(self) -> None:
        """Frees what is held for further jobs."""


# ---------------------------------------------------------------- processes


_running: set[int] = set()


def run_module(module: str, arguments: Sequence[str], limit_seconds: float, log: pathlib.Path) -> None:
    """Runs a module of moegen in a process group of its own; neither it nor what it started is left when this returns or raises.

    Raises:
        CandidateError: it crashed (`runtime`) or took too long (`timeout`).
    """
    path = os.pathsep.join(part for part in (str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")) if part)
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", f"{__package__}.{module}", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=os.environ | {"PYTHONPATH": path},
            start_new_session=True,
        )
        _running.add(process.pid)
        try:
            code = process.wait(limit_seconds)
        except subprocess.TimeoutExpired:
            raise CandidateError(f"it did not end within {limit_seconds:g} s", "timeout") from None
        finally:
            end(process.pid)
            process.wait()
            _running.discard(process.pid)
    if code:
        how = f"it crashed with {signal.Signals(-code).name}" if code < 0 else f"it ended with exit code {code}"
        said = _last_line(log)
        raise CandidateError(f"{how}{f': {said}' if said else ''}", "runtime")


def end_all() -> None:
    """Ends what other threads of this process are running."""
    for pid in list(_running):
        end(pid)


def in_parallel(function: Callable[[Item], Result], items: Sequence[Item], workers: int) -> Iterator[Result]:
    """What `function` makes of each item, in order, in threads; whatever goes wrong, nothing that they started is left."""
    with concurrent.futures.ThreadPoolExecutor(workers) as threads:
        futures = [threads.submit(function, item) for item in items]
        try:
            for future in futures:
                yield future.result()
        except BaseException:
            for future in futures:
                future.cancel()
            while concurrent.futures.wait(futures, _TICK_SECONDS).not_done:
                end_all()
            raise


def end(pid: int) -> None:
    """Kills a process that leads a group, its group, and those that it started in groups of their own, as compilers are."""
    for leader in (*_descendants(pid), pid):
        for kill in (os.killpg, os.kill):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                if kill is os.kill or leader == pid or os.getpgid(leader) == leader:
                    kill(leader, signal.SIGKILL)


def _descendants(pid: int) -> list[int]:
    """The processes that come from one, by what the system says of each one's parent."""
    parents: dict[int, int] = {}
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            parents[int(folder.name)] = int((folder / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()[1])
    found, before = [pid], 0
    while len(found) > before:
        before = len(found)
        found += [child for child, parent in parents.items() if parent in found and child not in found]
    return found[1:]


def _last_line(log: pathlib.Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((" ".join(line.split())[:200] for line in reversed(lines) if line.strip()), "")


class Here:
    """This machine, as a place.

    Args:
        folder: for files of its own.
        limit_seconds: a measurement that takes longer is a hang.
    """

    def __init__(self, folder: pathlib.Path, limit_seconds: float = 120.0) -> None:
        self.folder, self.limit_seconds = folder, limit_seconds

    def measure(self, job: Job) -> dict[str, Any]:
        """As `Place.measure`; the worker is a process of its own."""
        asked, answer = self.folder / "job.json", self.folder / "result.json"
        asked.write_text(json.dumps(job), encoding="utf-8")
        answer.unlink(missing_ok=True)
        run_module("worker", [str(asked), str(answer)], self.limit_seconds, self.folder / "worker.log")
        try:
            found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise CandidateError("it ended without a result", "runtime") from None
        return found

    def close(self) -> None:
        """Nothing is held."""


class Places:
    """Several places that measure at the same time. A place that is lost is asked no more; its job goes to another one, once.

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

    def measure(self, job: Job) -> dict[str, Any]:
        """As `Place.measure`, at the first place that is free.

        Raises:
            MeasureError: no place is left.
        """
        for last in (False, True):
            place = self._take()
            try:
                found = place.measure(job)
            except PlaceLost as error:
                with self._lock:
                    self.count -= 1
                if last:
                    raise CandidateError(f"two places were lost with it: {error}", "runtime") from error
                continue
            except BaseException:
                self._free.put(place)
                raise
            self._free.put(place)
            return found
        raise AssertionError("unreachable")

    def close(self) -> None:
        """Closes all of them."""
        for place in self._all:
            place.close()

    def _take(self) -> Place:
        while True:
            with self._lock:
                if not self.count:
                    raise MeasureError("no place to measure at is left: start servers again, and run the same command to go on")
            with contextlib.suppress(queue.Empty):
                return self._free.get(timeout=_TICK_SECONDS)


# ---------------------------------------------------------------- what the times say


@dataclasses.dataclass(frozen=True)
class Ratio:
    """Time of a candidate divided by that of the default, and the band that it lies in with a probability of 95 %."""

    value: float
    low: float
    high: float

    @property
    def band(self) -> list[float]:
        """As records have it."""
        return [self.low, self.high]


@dataclasses.dataclass(frozen=True)
class Measured:
    """One point of a result.

    Args:
        routing: name of the workload.
        tokens: T.
        default, candidate: seconds of a call in each round.
    """

    routing: str
    tokens: int
    default: tuple[float, ...]
    candidate: tuple[float, ...]

    @property
    def default_seconds(self) -> float:
        """Median time of the default."""
        return float(np.median(self.default))

    def to_dict(self) -> dict[str, Any]:
        """As records have it, with all samples."""
        found = ratio([self])
        return {
            "routing": self.routing,
            "tokens": self.tokens,
            "ratio": found.value,
            "band": found.band,
            "default_seconds": self.default_seconds,
            "seconds": float(np.median(self.candidate)),
            "samples": [[_short(s) for s in self.default], [_short(s) for s in self.candidate]],
        }


def ratio(points: Sequence[Measured]) -> Ratio:
    """The geometric mean over points of the median ratio in a round.

    Both layers meet the same state of the machine in a round, and another one in the next: ratios of medians would compare states
    of memory with one another, where half of the rounds fell into each. The band is a bootstrap over rounds.
    """
    rng = np.random.default_rng(0)
    total, drawn = 0.0, np.zeros(_RESAMPLES)
    for point in points:
        logs = np.log(np.asarray(point.candidate) / np.asarray(point.default))
        total += float(np.median(logs))
        drawn += np.median(logs[rng.integers(len(logs), size=(_RESAMPLES, len(logs)))], axis=1)
    low, high = np.percentile(drawn / len(points), _BAND_PERCENT)
    return Ratio(math.exp(total / len(points)), math.exp(low), math.exp(high))


def points_of(result: Mapping[str, Any], dtype: str) -> list[Measured]:
    """The points of a result.

    Raises:
        CandidateError: one of the layers was wrong at a point (`wrong`), or the result is not whole (`runtime`).
    """
    points: list[Measured] = []
    for point in result.get("points", []):
        default, candidate = (math.inf if error is None else error for error in point["relative_l2"])
        where = f"at {point['tokens']} tokens, {pathlib.Path(point['workload']).name} routing"
        for who, error in (("the default", default), ("it", candidate)):
            if not error <= RELATIVE_L2[dtype]:
                raise CandidateError(f"{who} is off by a relative L2 error of {error:.1e} {where}", "wrong")
        first, second = ([float(s) for s in samples] for samples in point["seconds"])
        if not first or len(first) != len(second) or not all(0 < s < math.inf for s in (*first, *second)):
            raise CandidateError(f"there are no times {where}", "runtime")
        points.append(Measured(pathlib.Path(point["workload"]).name, int(point["tokens"]), tuple(first), tuple(second)))
    if not points:
        raise CandidateError("there are no points in the result", "runtime")
    return points


def merged(results: Sequence[Sequence[Measured]]) -> list[Measured]:
    """Samples of several measurements of the same points, put together."""
    found: dict[tuple[str, int], Measured] = {}
    for point in (point for points in results for point in points):
        key = (point.routing, point.tokens)
        before = found.get(key)
        found[key] = point if before is None else dataclasses.replace(
            before, default=before.default + point.default, candidate=before.candidate + point.candidate
        )  # fmt: skip
    return list(found.values())


def geometric_mean(values: Sequence[float]) -> float:
    """Of positive numbers."""
    logs: npt.NDArray[np.float64] = np.log(np.asarray(values, np.float64))
    return float(np.exp(logs.mean()))


def _short(seconds: float) -> float:
    """Four digits are more than times have: records stay small."""
    return float(f"{seconds:.4g}")
