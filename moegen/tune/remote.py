"""Measuring on other machines, through TVM's RPC: places that measure as the local one does, one for each server.

On the machine that knows the others, and on each machine that is to measure, where pip install 'moegen[rpc]' was run:

    python -m tvm.exec.rpc_tracker --port 9190
    python -m tvm.exec.rpc_server --tracker HOST:9190 --key NAME

(and --custom-addr ADDRESS for a server on the tracker's own machine, that others reach by another address than the tracker).
Whoever reaches a server can run anything there: TVM's RPC is for networks whose users are trusted.

A server measures for one client at a time. It needs neither moegen nor a C++ compiler, but a processor that runs the code that
is measured: one that lacks features which the layers were compiled for is refused. That it is the processor which the records
are for, is for the user to see to, by the servers' key; the result says which it was.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import pathlib
import threading
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..arrays import HostArray, to_float32
from ..artifact import Artifact, check_files, open_artifact
from ..bench import workload
from ..errors import MeasureError, PlaceLost
from .guest import Guest, Stamp, batch_stamp
from .wire import PATIENCE_SECONDS, Tracker

SESSION_SECONDS = 4 * 3600  # a server is free again so long after a client's machine fell silent
_LIMIT_SECONDS = 60.0
_studying = threading.Lock()


def servers(tracker: str, key: str, needed: int = 1, patience: float = PATIENCE_SECONDS) -> list[Place]:
    """One place for each free server that the tracker has under a key.

    Args:
        tracker: HOST:PORT.
        key: what the servers were started with.
        needed: the fewest that will do.
        patience: seconds that tracker and servers may take to answer and to become free.

    Raises:
        MeasureError: the tracker does not answer, or has fewer; the message says what to start.
    """
    where = Tracker(tracker, patience)
    free = where.free(key)
    if free < needed:
        raise MeasureError(
            f"the tracker {tracker} has {free} free servers under key {key!r}, needed are {needed}: {where.how_to_serve(key)}"
        )
    return [Place(where, key) for _ in range(free)]


class Place:
    """Measures on whichever server of a key the tracker gives it, and stays there.

    What the server holds of the default and of the weights is kept between jobs, and brought anew when the default or the number
    of copies changes, or to another server after the first was lost. Not for several threads at once, but for `close`.
    """

    def __init__(self, tracker: Tracker, key: str) -> None:
        self.tracker, self.key = tracker, key
        self._guest: Guest | None = None
        self._terms: tuple[str, int] | None = None
        self._until = 0.0

    def measure(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """Carries out a job; a point where a layer is wrong is not timed, nor are those that follow.

        Args:
            job: "artifacts": folders of the default and of the candidate, with the same packed layout; "workload": folders made by
                `moegen.bench.workload`, with batches for each T of "tokens"; "threads"; "rounds"; "min_ms" of a turn; "copies" of
                the weights to go around; perhaps "limit_s", after which a candidate that does not answer is given up.

        Returns:
            "points": for each folder and T, "workload", "tokens", "relative_l2" [default, candidate] (None when not finite) and
            "seconds" [[...], [...]], a median for each round; "machine": "server", "processor", "processors".

        Raises:
            PlaceLost: the server is gone, or none was free. The next job looks for one again.
            CandidateError: the candidate crashed, hung or failed; the server and what it holds are well.
            MeasureError: the job cannot be done here, whatever the candidate.
            ArtifactError, BuildError: an artifact is damaged; there is no C++ compiler for the helper.
        """
        default, candidate = (_opened(folder) for folder in job["artifacts"])
        if default.manifest["segments"] != candidate.manifest["segments"] or default.config != candidate.config:
            raise MeasureError(f"{candidate.name} has another weight layout than the default {default.name}")
        guest = self._at(default, int(job["copies"]))
        try:
            if int(job["threads"]) > guest.machine["processors"]:
                raise MeasureError(
                    f"threads={job['threads']} are more than the {guest.machine['processors']} processors of {guest.line}"
                )
            return {"points": _points(guest, candidate, job), "machine": guest.machine}
        except PlaceLost:
            self.close()
            raise

    def close(self) -> None:
        """Gives the server back; a job that is under way is lost."""
        guest, self._guest = self._guest, None
        if guest is not None:
            guest.close()

    def _at(self, default: Artifact, copies: int) -> Guest:
        """The guest of the server, anew where the last one does not serve."""
        terms = default.manifest["files"][default.library.name]["sha256"], copies
        if self._guest is None or self._terms != terms or time.monotonic() > self._until:
            self.close()
            self._until = time.monotonic() + SESSION_SECONDS / 2
            line = self.tracker.claim(self.key, SESSION_SECONDS)
            with contextlib.ExitStack() as undo:
                undo.callback(line.cut)
                self._guest, self._terms = Guest(line, default, copies), terms
                undo.pop_all()
        return self._guest

    def __str__(self) -> str:
        return f"a server of key {self.key!r}" if self._guest is None else str(self._guest.line)


def _opened(folder: str | os.PathLike[str]) -> Artifact:
    artifact = open_artifact(folder)
    check_files(artifact)
    return artifact


def _points(guest: Guest, candidate: Artifact, job: Mapping[str, Any]) -> list[dict[str, Any]]:
    todo = [(pathlib.Path(folder), int(tokens)) for folder in job["workload"] for tokens in job["tokens"]]
    guest.take(candidate)
    guest.keep(set(todo))
    points: list[dict[str, Any]] = []
    for folder, tokens in todo:
        timed = not points or bool(points[-1]["seconds"][0])
        points.append(_point(guest, folder, tokens, job, timed))
    return points


def _point(guest: Guest, folder: pathlib.Path, tokens: int, job: Mapping[str, Any], timed: bool) -> dict[str, Any]:
    config, limit, threads = guest.default.config, float(job.get("limit_s", _LIMIT_SECONDS)), int(job["threads"])
    guest.bring(folder)
    x, checks = guest.batches(folder, tokens), _checks(folder, tokens)
    got, took = guest.answers(x, checks.rows, threads, limit)
    errors = [_error(which, took_by, checks, config.dtype) for which, took_by in zip(got, took, strict=True)]
    seconds: list[list[float]] = [[], []]
    if timed and all(error <= workload.RELATIVE_L2[config.dtype] for error in errors):
        turn, rounds = float(job["min_ms"]) / 1e3, int(job["rounds"])
        # A candidate may be slower than the default, but one that takes ten times as long as it took to check it is hanging.
        expected = rounds * (2 * turn + 2 * float(took.sum()) + took.max() / max(took[0].min(), 1e-9) * turn)
        seconds = guest.times(x, threads, rounds, turn, limit + 10 * expected)
    finite = [error if math.isfinite(error) else None for error in errors]
    return {"workload": str(folder), "tokens": tokens, "relative_l2": finite, "seconds": seconds}


def _error(got: Any, took: Any, checks: workload.Checks, dtype: str) -> float:
    """Relative L2 error of the checked tokens of those batches that were called."""
    called = int(np.count_nonzero(took))
    expected = np.concatenate(checks.expected[:called])
    return workload.relative_l2(to_float32(HostArray(got[: len(expected)], dtype)), expected)


def _checks(folder: pathlib.Path, tokens: int) -> workload.Checks:
    """The right outputs: those that were saved, or computed once for all places."""
    with _studying:
        return workload.read_checks(folder, tokens) or _studied(folder, tokens, batch_stamp(folder, tokens))


@functools.lru_cache(maxsize=64)
def _studied(folder: pathlib.Path, tokens: int, stamp: Stamp) -> workload.Checks:
    return workload.study(folder, tokens)[1]
