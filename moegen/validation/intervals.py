"""Confidence intervals of how much slower another contender is.

Contenders take turns, so that both turns of a round meet much the same machine: each round gives one ratio, their median call over
ours. The interval is that of the median of these ratios by order statistics: with n rounds, the true median lies outside of
the k-th smallest and the k-th largest with probability 2 P(Binomial(n, 1/2) < k), whatever the distribution (W. J. Conover,
Practical Nonparametric Statistics, 3.2). It supposes that rounds are independent of one another, nothing else.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import Any

METHOD = "paired ratios of interleaved rounds; median with its order-statistic (sign test) interval"


@dataclasses.dataclass(frozen=True)
class Interval:
    """The median of the rounds' ratios, and the interval of it.

    Args:
        confidence: the probability that such an interval holds the true median, at least the one that was asked for.
    """

    median: float
    low: float
    high: float
    confidence: float
    rounds: int

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


def ratio_interval(theirs: Sequence[float], ours: Sequence[float], confidence: float) -> Interval | None:
    """The interval of their time over ours.

    Args:
        theirs, ours: the medians of each round, in seconds, paired from the first round on.
        confidence: the least probability.

    Returns:
        None when there are too few rounds for such an interval (95 % takes six).
    """
    ratios = sorted(a / b for a, b in zip(theirs, ours, strict=False))
    rounds = len(ratios)
    rank, outside = 0, 0.0
    while rank < rounds // 2:
        further = outside + 2 * math.comb(rounds, rank) / 2**rounds
        if further > 1 - confidence:
            break
        rank, outside = rank + 1, further
    if rank == 0:
        return None
    return Interval(statistics.median(ratios), ratios[rank - 1], ratios[rounds - rank], 1 - outside, rounds)
