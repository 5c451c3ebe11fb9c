"""The process that measures one candidate beside the default: both layers on the same packed weights, turn and turn about.

    python -m moegen.tune.worker JOB.json RESULT.json

`moegen.tune.places` describes jobs and results.
"""

from __future__ import annotations

import json
import math
import pathlib
import resource
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..arrays import HostArray, empty_aligned, to_float32
from ..artifact import Artifact, check_loadable, open_artifact
from ..bench import workload
from ..config import MoEConfig
from ..machine import end_with_parent
from ..runtime import Layer, Module
from ..weights import WeightSource, resolve

PACKED = "packed.bin"
_ASLEEP_SECONDS = 1e-3  # the threads of the other layer's pool wait busily for a part of that
_TRIES = 4
_SLICE_SECONDS = 10e-3  # of a scheduler: a call that takes longer is disturbed sooner or later, however often it is repeated

Array = npt.NDArray[Any]


class Point(Protocol):
    """The default and a candidate at one number of tokens."""

    def error(self, which: int) -> float:
        """Relative L2 error of the checked tokens of all batches, written over NaN, by the default (0) or the candidate (1)."""

    def samples(self, rounds: int, min_seconds: float) -> list[list[float]]:
        """[default, candidate], each with the time of a call in each round; who begins changes from round to round."""


class Pair(Protocol):
    """The default and a candidate on the same packed weights."""

    config: MoEConfig

    def route_as(self, folder: pathlib.Path) -> None:
        """Takes the router of a variant of the workload."""

    def point(self, folder: pathlib.Path, tokens: int) -> Point:
        """What is measured at one number of tokens."""

    def facts(self) -> dict[str, Any]:
        """What a result says beside its points."""


class _Pair:
    """The layers of two artifacts on the same packed weights, of which there may be several copies.

    Args:
        artifacts: folders of the default and of the candidate, whose weight layouts are equal.
        folder: the workload whose weights they have.
        copies: of the weights, which calls take in turn, so that a small layer does not stay in the caches.
    """

    def __init__(self, artifacts: Sequence[str], folder: pathlib.Path, threads: int, copies: int) -> None:
        self.modules = [Module(opened(path), threads) for path in artifacts]
        self.config = self.modules[0].config
        check_layouts(module.artifact for module in self.modules)
        self.threads = threads
        self.base = workload.variant_of(folder)
        self.blobs = [_packed(self.modules[0], self.base, threads)]
        self.blobs += [_copy(self.blobs[0]) for _ in range(copies - 1)]
        self.layers = [[Layer(module, blob, threads) for blob in self.blobs] for module in self.modules]

    def route_as(self, folder: pathlib.Path) -> None:
        """Takes the router of a variant of the workload."""
        source = variant(self.config, folder, self.base)
        for blob in self.blobs:
            self.modules[0].packer(self.threads, blob).router(source)

    def point(self, folder: pathlib.Path, tokens: int) -> _Point:
        """What is measured at one number of tokens."""
        return _Point(self, folder, tokens)

    def facts(self) -> dict[str, Any]:
        """Nothing."""
        return {}


class _Point:
    """A pair at one number of tokens."""

    def __init__(self, pair: _Pair, folder: pathlib.Path, tokens: int) -> None:
        self.pair = pair
        self.inputs = [_aligned(batch) for batch in workload.read_batches(folder, tokens)]
        self.outputs = [HostArray(empty_aligned(x.shape, x.data.dtype), x.dtype) for x in self.inputs]
        self.checks = checks_of(folder, tokens)

    def error(self, which: int) -> float:
        """Relative L2 error of the checked tokens of all batches, written over NaN."""
        values = []
        for index, (x, out, rows) in enumerate(zip(self.inputs, self.outputs, self.checks.rows, strict=True)):
            out.data.view(np.uint8)[...] = 0xFF
            self._layer(which, index).forward_into(x, out)
            values.append(to_float32(HostArray(out.data[rows], out.dtype)))
        return workload.relative_l2(np.concatenate(values), np.concatenate(self.checks.expected))

    def samples(self, rounds: int, min_seconds: float) -> list[list[float]]:
        """[default, candidate], each with the median time of a call in each round; who begins changes from round to round."""
        typical = min(self._call(0, 0)[0], self._call(0, 1)[0])
        calls, short = max(1, math.ceil(min_seconds / typical)), typical < _SLICE_SECONDS
        found: list[list[float]] = [[], []]
        for number in range(rounds):
            for which in (0, 1) if number % 2 == 0 else (1, 0):
                found[which].append(self._turn(which, number * calls, calls, short))
        return found

    def _turn(self, which: int, first: int, calls: int, short: bool) -> float:
        """So many calls from batch `first` on, the same for both layers; short ones come after one that wakes the threads.

        Calls during which the system took a processor away do not count, where others are left; a turn of short calls without any
        is repeated.
        """
        whole: list[float] = []
        for _ in range(_TRIES if short else 1):
            time.sleep(_ASLEEP_SECONDS)
            if short:
                self._call(which, first - 1)
            timed = [self._call(which, first + number) for number in range(calls)]
            if undisturbed := [seconds for seconds, disturbed in timed if not disturbed]:
                return float(np.median(undisturbed))
            whole.append(float(np.median([seconds for seconds, _ in timed])))
        return min(whole)

    def _call(self, which: int, number: int) -> tuple[float, bool]:
        """(seconds, whether other processes took the place of a thread meanwhile)."""
        index = number % len(self.inputs)
        layer, x, out = self._layer(which, number), self.inputs[index], self.outputs[index]
        switches = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
        start = time.perf_counter()
        layer.forward_into(x, out)
        seconds = time.perf_counter() - start
        return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw != switches

    def _layer(self, which: int, index: int) -> Layer:
        layers = self.pair.layers[which]
        return layers[index % len(layers)]


def _pair(job: Mapping[str, Any], folder: pathlib.Path) -> _Pair:
    return _Pair(job["artifacts"], folder, int(job["threads"]), int(job["copies"]))


# ---------------------------------------------------------------- for processors and devices alike


def opened(path: str) -> Artifact:
    """A whole artifact that can be loaded here."""
    artifact = open_artifact(path)
    check_loadable(artifact)
    return artifact


def check_layouts(artifacts: Iterable[Artifact]) -> None:
    """Raises a ValueError for artifacts that cannot share their weights."""
    first, second = (artifact.manifest["segments"] for artifact in artifacts)
    if first != second:
        raise ValueError("the candidate has another weight layout than the default")


def variant(config: MoEConfig, folder: pathlib.Path, base: pathlib.Path) -> WeightSource:
    """The weights of a workload that has all but its router in common with `base`."""
    if workload.variant_of(folder) != base:
        raise ValueError(f"{folder} does not share its weights with {base}")
    return resolve(config, workload.read_weights(folder))


def checks_of(folder: pathlib.Path, tokens: int) -> workload.Checks:
    """What outputs should be, as it was kept or by the reference."""
    checks = workload.read_checks(folder, tokens)
    return workload.study(folder, tokens)[1] if checks is None else checks


def measure(job: Mapping[str, Any], make: Callable[[Mapping[str, Any], pathlib.Path], Pair] = _pair) -> dict[str, Any]:
    """Carries out a job; a point where a layer is wrong is not timed, nor are those that follow.

    Args:
        make: makes the pair for a job, with the weights of a workload.
    """
    folders = [pathlib.Path(folder) for folder in job["workload"]]
    pair = make(job, folders[0])
    bound = workload.bound(pair.config)
    points, right = [], True
    for folder in folders:
        pair.route_as(folder)
        for tokens in job["tokens"]:
            point = pair.point(folder, tokens)
            errors = [point.error(which) for which in (0, 1)]
            right = right and all(error <= bound for error in errors)
            seconds = point.samples(int(job["rounds"]), float(job["min_ms"]) / 1e3) if right else [[], []]
            finite = [error if math.isfinite(error) else None for error in errors]
            points.append({"workload": str(folder), "tokens": tokens, "relative_l2": finite, "seconds": seconds})
    return {"points": points} | pair.facts()


def _packed(module: Module, folder: pathlib.Path, threads: int) -> Array:
    """The packed weights: from the file that an earlier job left, or packed now and left to later ones.

    Read rather than mapped: a layer of a user's has its weights on huge pages, a mapped file has not.
    """
    file, size = folder / PACKED, int(module.artifact.manifest["packed_bytes"])
    blob = empty_aligned(size, np.uint8)
    if file.exists() and file.stat().st_size == size:
        with file.open("rb") as opened:
            opened.readinto(blob.data)
        return blob
    module.packer(threads, blob).all(resolve(module.config, workload.read_weights(folder)))
    temporary = file.with_suffix(".part")
    blob.tofile(temporary)
    temporary.rename(file)
    return blob


def _copy(array: Array) -> Array:
    own = empty_aligned(array.shape, array.dtype)
    own[...] = array
    return own


def _aligned(batch: HostArray) -> HostArray:
    return HostArray(_copy(batch.data), batch.dtype)


def main(make: Callable[[Mapping[str, Any], pathlib.Path], Pair] = _pair) -> None:
    """Reads the job, writes the result."""
    end_with_parent()
    job, result = map(pathlib.Path, sys.argv[1:3])
    found = measure(json.loads(job.read_text(encoding="utf-8")), make)
    result.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
