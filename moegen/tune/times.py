"""What measured times say: the ratio of a candidate's to the default's, and how well it is known."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..bench.workload import bound
from ..config import MoEConfig
from ..errors import CandidateError

_RESAMPLES = 1000
_BAND_PERCENT = (2.5, 97.5)


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


def points_of(result: Mapping[str, Any], config: MoEConfig) -> list[Measured]:
    """The points of a result.

    Raises:
        CandidateError: one of the layers was wrong at a point (`wrong`), or the result is not whole (`runtime`).
    """
    points: list[Measured] = []
    for point in result.get("points", []):
        default, candidate = (math.inf if error is None else error for error in point["relative_l2"])
        where = f"at {point['tokens']} tokens, {pathlib.Path(point['workload']).name} routing"
        for who, error in (("the default", default), ("it", candidate)):
            if not error <= bound(config):
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
