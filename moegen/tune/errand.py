"""The process that measures on one server for a place: it carries out jobs, one JSON line each, until its input ends.

    python -m moegen.tune.errand TRACKER KEY PATIENCE JOBS-FD REPLIES-FD

A job measures, as `moegen.tune.remote.Place.measure` describes it, or asks for the server's "measurer". Replies are JSON lines as
well: "within" and "doing" announce an exchange with the server and the seconds that it may take, and each job ends in a "result" or
in an "error" (class of the exception, message, a candidate's status).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..arrays import HostArray, to_float32
from ..artifact import Artifact, check_files, open_artifact
from ..bench import workload
from ..errors import MeasureError, MoegenError, PlaceLost
from .device_guest import DeviceGuest
from .guest import Guest, Stamp, batch_stamp
from .host import Host
from .processor_guest import ProcessorGuest
from .wire import Announce, Tracker

SESSION_SECONDS = 4 * 3600  # a server is free again so long after a client's machine fell silent
_LIMIT_SECONDS = 60.0
_GUESTS: dict[str, type[Guest]] = {"llvm": ProcessorGuest, "cuda": DeviceGuest}  # by the kind of target
_SLACK = 10.0  # what takes so many times as long as it took to check it is hanging


class Errand:
    """Measures on whichever server of a key the tracker names, and stays there while it serves."""

    def __init__(self, tracker: Tracker, key: str, announce: Announce) -> None:
        self.tracker, self.key, self.announce = tracker, key, announce
        self._host: Host | None = None
        self._kind = ("", "")
        self._guest: Guest | None = None
        self._terms: tuple[str, int] | None = None
        self._until = 0.0

    def measurer(self, target: str, arch: str) -> dict[str, Any]:
        """What measures on the server, for a target's slug and the architecture around it."""
        return dataclasses.asdict(self._at(target, arch).measurer)

    def measure(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """Carries out a job, as `moegen.tune.remote.Place.measure` describes it."""
        default, candidate = (_opened(folder) for folder in job["artifacts"])
        if default.manifest["segments"] != candidate.manifest["segments"] or default.config != candidate.config:
            raise MeasureError(f"{candidate.name} has another weight layout than the default {default.name}")
        try:
            guest = self._with(default, int(job["copies"]))
            _check(guest, job)
            machine = {"server": guest.line.address, "processor": guest.host.measurer.name}
            return {"points": _points(guest, candidate, job), "machine": machine | {"processors": guest.host.measurer.processors}}
        except PlaceLost:
            self._leave()
            raise

    def _at(self, target: str, arch: str) -> Host:
        """The session with the server, anew where the last one is over."""
        kind = target.partition("-")[0], arch
        if self._host is None or self._kind != kind or time.monotonic() > self._until:
            self._leave()
            self._until = time.monotonic() + SESSION_SECONDS / 2
            self._host = Host(self.tracker.claim(self.key, SESSION_SECONDS, self.announce), target, arch)
            self._kind = kind
        return self._host

    def _with(self, default: Artifact, copies: int) -> Guest:
        """The guest for a default, anew where the last one does not serve."""
        terms = str(default.manifest["manifest_sha256"]), copies
        if self._guest is not None and self._terms != terms:
            self._leave()
        host = self._at(default.target.slug, default.target.arch)
        if self._guest is None:
            self._guest, self._terms = _GUESTS[default.target.kind](host, default, copies), terms
        return self._guest

    def _leave(self) -> None:
        """Ends the session: nothing refers to it any more."""
        self._host = self._guest = None


def _opened(folder: str | os.PathLike[str]) -> Artifact:
    artifact = open_artifact(folder)
    check_files(artifact)
    return artifact


def _check(guest: Guest, job: Mapping[str, Any]) -> None:
    """Raises a MeasureError for a job that is for another machine."""
    by = guest.host.measurer
    if int(job["threads"]) > by.processors:
        raise MeasureError(f"threads={job['threads']}, but {guest.line} has {by.processors} processors")
    if (wanted := job.get("processor", by.name)) != by.name:
        raise MeasureError(
            f"{guest.line} has {by.name}, and this run measures on {wanted}: give servers of each kind a key of their own"
        )


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
    if timed and all(error <= workload.bound(config) for error in errors):
        turn, rounds = float(job["min_ms"]) / 1e3, int(job["rounds"])
        cycles = [float(np.mean(took_by[took_by > 0])) * len(took_by) for took_by in took]  # of a cycle through all batches
        expected = rounds * (turn + cycles[0]) * (1 + max(1.0, cycles[1] / cycles[0]))
        seconds = guest.times(x, threads, rounds, turn, limit + _SLACK * expected)
    finite = [error if math.isfinite(error) else None for error in errors]
    return {"workload": str(folder), "tokens": tokens, "relative_l2": finite, "seconds": seconds}


def _error(got: Any, took: Any, checks: workload.Checks, dtype: str) -> float:
    """Relative L2 error of the checked tokens of those batches that were called."""
    called = int(np.count_nonzero(took))
    expected = np.concatenate(checks.expected[:called])
    return workload.relative_l2(to_float32(HostArray(got[: len(expected)], dtype)), expected)


def _checks(folder: pathlib.Path, tokens: int) -> workload.Checks:
    """The right outputs: those that were saved, or computed once."""
    return workload.read_checks(folder, tokens) or _studied(folder, tokens, batch_stamp(folder, tokens))


@functools.lru_cache(maxsize=64)
def _studied(folder: pathlib.Path, tokens: int, stamp: Stamp) -> workload.Checks:
    return workload.study(folder, tokens)[1]


def _answer(errand: Errand, job: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return {"result": errand.measurer(job["measurer"], job["arch"]) if "measurer" in job else errand.measure(job)}
    except MoegenError as error:
        return {"error": type(error).__name__, "message": str(error), "status": getattr(error, "status", None)}


def main() -> None:
    """Carries out jobs until they end."""
    tracker, key, patience, jobs, replies = sys.argv[1:6]
    with os.fdopen(int(jobs)) as incoming, os.fdopen(int(replies), "w", buffering=1) as outgoing:

        def announce(seconds: float, doing: str) -> None:
            print(json.dumps({"within": seconds, "doing": doing}), file=outgoing)

        errand = Errand(Tracker(tracker, float(patience)), key, announce)
        for line in incoming:
            print(json.dumps(_answer(errand, json.loads(line))), file=outgoing)


if __name__ == "__main__":
    main()
