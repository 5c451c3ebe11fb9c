"""The process that a family of contenders lives in: it answers requests, one JSON line each, until its input ends.

    python -m moegen.bench.contenders.worker MODULE SETTINGS-AS-JSON REQUESTS-FD REPLIES-FD

Requests and replies have pipes of their own, so that a library that prints does no harm.
"""

from __future__ import annotations

import importlib
import json
import os
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from ...arrays import HostArray, empty_aligned, to_float32
from ...machine import end_with_parent
from ..workload import read_batches
from .family import Family, Settings, poison

_SLOW_SECONDS = 0.5  # a call so long needs no warming up, and one batch of it is checked


class Worker:
    """A family, the batches of the point that is being measured, and where each contender stands in them."""

    def __init__(self, family: Family) -> None:
        self.family = family
        self.inputs: list[Any] = []
        self.outputs: list[HostArray] = []
        self.wrapped: list[Any] = []
        self.next: dict[str, int] = {}
        self.last_seconds: dict[str, float] = {}

    def point(self, tokens: int) -> dict[str, Any]:
        """Takes the batches of a point; outputs go to memory of their own."""
        self.inputs = self.outputs = self.wrapped = []
        batches = read_batches(self.family.settings.folder, tokens)
        aligned = [_aligned(batch) for batch in batches]
        self.inputs = [self.family.wrap(batch) for batch in aligned]
        self.outputs = [HostArray(empty_aligned(batch.shape, batch.data.dtype), batch.dtype) for batch in batches]
        self.wrapped = [self.family.wrap(out) for out in self.outputs]
        self.next, self.last_seconds = {}, {}
        return {"workspace_bytes": self.family.workspace_bytes(tokens)}

    def check(self, name: str, rows: Sequence[Sequence[int]], to: str) -> dict[str, Any]:
        """One call for each batch into poisoned memory (only the first when it is slow); saves the outputs of some tokens."""
        seconds, values = [], []
        for index, chosen in enumerate(rows):
            poison(self.outputs[index])
            seconds.append(self._call(name, index))
            out = self.outputs[index]
            values.append(to_float32(HostArray(out.data[list(chosen)], out.dtype)))
            if seconds[-1] > _SLOW_SECONDS:
                break
        np.save(to, np.concatenate(values))
        return {"seconds": seconds}

    def time(self, name: str, seconds: float, most_calls: int) -> dict[str, Any]:
        """Calls for at least so long after one call that brings the contender's data and threads back; cycles through batches."""
        if self.last_seconds.get(name, 0.0) < _SLOW_SECONDS:
            self._step(name)
        samples: list[float] = []
        waited, start = _waited_seconds(), time.perf_counter()
        while not samples or (sum(samples) < seconds and len(samples) < most_calls):
            samples.append(self._step(name))
        processors = (time.perf_counter() - start) * self.family.settings.threads
        return {"seconds": samples, "waited": None if waited is None else ((_waited_seconds() or 0.0) - waited) / processors}

    def profile(self, name: str, calls: int) -> dict[str, Any]:
        """The parts of so many calls, after one that brings data and threads back."""
        self._step(name)
        return {"parts": [self.family.profile(self.inputs[self._turn(name)]) for _ in range(calls)]}

    def _step(self, name: str) -> float:
        return self._call(name, self._turn(name))

    def _turn(self, name: str) -> int:
        index = self.next.get(name, 0)
        self.next[name] = (index + 1) % len(self.inputs)
        return index

    def _call(self, name: str, index: int) -> float:
        call, x, out = self.family.calls[name], self.inputs[index], self.wrapped[index]
        start = time.perf_counter()
        call(x, out)
        self.last_seconds[name] = elapsed = time.perf_counter() - start
        return elapsed


def _waited_seconds() -> float | None:
    """Seconds that this process' threads were ready and had no processor; None where the system does not say."""
    try:
        waits = [int(file.read_text().split()[1]) for file in pathlib.Path("/proc/self/task").glob("*/schedstat")]
    except (OSError, IndexError, ValueError):  # no such files, or a thread ended meanwhile
        return None
    return sum(waits) / 1e9 if waits else None


def _aligned(batch: HostArray) -> HostArray:
    own = empty_aligned(batch.shape, batch.data.dtype)
    own[...] = batch.data
    return HostArray(own, batch.dtype)


def _answer(worker: Worker, request: dict[str, Any]) -> dict[str, Any]:
    asked = {"point": worker.point, "check": worker.check, "time": worker.time, "profile": worker.profile}
    try:
        return asked[request.pop("ask")](**request)  # type: ignore[operator, no-any-return]
    except Exception as error:  # a library may raise anything: it is reported, and the others of the family go on
        return {"error": _sentence(error)}


def _sentence(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300] if lines else 'no message'}"


def _open(module: str, settings: dict[str, Any]) -> Family:
    given = Settings(pathlib.Path(settings["folder"]), int(settings["threads"]), str(settings["artifact"]))
    family: Family = importlib.import_module(module).open_family(given)
    return family


def main() -> None:
    """Opens the family, says what it can do, and answers until the requests end."""
    end_with_parent()  # a stopped worker must not outlive a killed benchmark
    module, settings, requests, replies = sys.argv[1:5]
    with os.fdopen(int(requests)) as incoming, os.fdopen(int(replies), "w", buffering=1) as outgoing:
        try:
            family = _open(module, json.loads(settings))
        except Exception as error:
            print(json.dumps({"error": _sentence(error)}), file=outgoing)
            return
        said = {"calls": list(family.calls), "obstacles": family.obstacles, "facts": family.facts()}
        print(json.dumps(said), file=outgoing)
        worker = Worker(family)
        for line in incoming:
            print(json.dumps(_answer(worker, json.loads(line))), file=outgoing)


if __name__ == "__main__":
    main()
