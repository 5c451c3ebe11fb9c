"""The process that measures one candidate beside the default on a CUDA device: as `worker`, with the device's own clock.

    python -m moegen.tune.device_worker JOB.json RESULT.json

Weights and tokens are in the device's memory before anything is timed. A turn is several calls, one behind the other on a stream,
between two events, so that neither Python nor waiting for the device is in the times. Where launching takes longer than what is
launched, times are the launches'. Calls take the copies of the weights in turn, and the batches.
"""

from __future__ import annotations

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..arrays import HostArray, empty_aligned, to_float32
from ..bench import workload
from ..cuda import hardware
from ..device import DeviceModule
from .worker import check_layouts, checks_of, main, opened, variant

_MOST_CALLS = 4096  # of a turn: what ends sooner is a toy


class _Pair:
    """The modules of two artifacts and the packed weights that both take, of which there may be several copies.

    Args:
        artifacts: folders of the default and of the candidate, whose weight layouts are equal.
        folder: the workload whose weights they have.
        copies: of the weights, which calls take in turn, so that those of a small layer do not stay in the device's cache.
    """

    def __init__(self, artifacts: Sequence[str], folder: pathlib.Path, copies: int) -> None:
        self.modules = [DeviceModule(opened(path)) for path in artifacts]
        self.config = self.modules[0].config
        check_layouts(module.artifact for module in self.modules)
        self.base = workload.variant_of(folder)
        first = self.modules[0]
        source = variant(self.config, folder, self.base)
        self.blobs = [first.packer().all(source)]
        for _ in range(copies - 1):
            self.blobs.append(first.empty(tuple(self.blobs[0].shape), "uint8"))
            first.functions["copy"](self.blobs[-1], self.blobs[0], first.device)

    def route_as(self, folder: pathlib.Path) -> None:
        """Takes the router of a variant of the workload."""
        source = variant(self.config, folder, self.base)
        for blob in self.blobs:
            self.modules[0].packer(blob=blob).router(source)

    def point(self, folder: pathlib.Path, tokens: int) -> _Point:
        """What is measured at one number of tokens."""
        return _Point(self, folder, tokens)

    def facts(self) -> dict[str, Any]:
        """The device that measured."""
        return {"machine": {"processor": hardware.name()}}


class _Point:
    """A pair at one number of tokens."""

    def __init__(self, pair: _Pair, folder: pathlib.Path, tokens: int) -> None:
        self.pair, self.config = pair, pair.config
        module = pair.modules[0]
        self.inputs = [module.upload(batch.data, self.config.dtype) for batch in workload.read_batches(folder, tokens)]
        self.shape = (tokens, self.config.hidden)
        self.out = module.empty(self.shape, self.config.dtype)
        self.workspaces = [module.empty((int(module.functions["workspace_bytes"](tokens)),), "uint8") for module in pair.modules]
        self.checks = checks_of(folder, tokens)

    def error(self, which: int) -> float:
        """Relative L2 error of the checked tokens of all batches, written over NaN."""
        module, found = self.pair.modules[which], []
        host = empty_aligned(self.shape, self.config.dtype)
        for index, rows in enumerate(self.checks.rows):
            host.view(np.uint8)[...] = 0xFF
            module.functions["copy"](self.out, host, module.device)
            self._seconds(which, index, 1)
            module.download(self.out, host)
            found.append(to_float32(HostArray(host[rows], self.config.dtype)))
        return workload.relative_l2(np.concatenate(found), np.concatenate(self.checks.expected))

    def samples(self, rounds: int, min_seconds: float) -> list[list[float]]:
        """[default, candidate], each with the mean time of a call in each round; who begins changes from round to round."""
        typical = max(min(self._seconds(which, 0, len(self.inputs)) for which in (0, 1)), min_seconds / _MOST_CALLS)
        calls = math.ceil(min_seconds / typical)
        found: list[list[float]] = [[], []]
        for number in range(rounds):
            for which in (0, 1) if number % 2 == 0 else (1, 0):
                self._seconds(which, number * calls - 1, 1)  # the clocks go up, and the other module's code leaves the cache
                found[which].append(self._seconds(which, number * calls, calls))
        return found

    def _seconds(self, which: int, first: int, calls: int) -> float:
        """Of a call, from batch and copy `first` on, the same for both modules."""
        time = self.pair.modules[which].functions["time"]
        return float(time(self.inputs, self.out, self.pair.blobs, self.workspaces[which], first % _period(self), calls))


def _period(point: _Point) -> int:
    return math.lcm(len(point.inputs), len(point.pair.blobs))


def pair(job: Mapping[str, Any], folder: pathlib.Path) -> _Pair:
    """What a job measures, with the weights of a workload."""
    return _Pair(job["artifacts"], folder, int(job["copies"]))


if __name__ == "__main__":
    main(pair)
