"""The counts of one layer: totals, the window, and how the totals came about."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..errors import InputError
from . import measures
from .measures import Summary

MOST_MOMENTS = 128
FIRST_STEP_SECONDS = 0.1

Totals = npt.NDArray[np.int64]


class Moment(NamedTuple):
    """The totals at a time: seconds since the epoch, calls, counts [E]."""

    seconds: float
    calls: int
    counts: Totals


class LayerCounts:
    """What the experts of one layer were given. Not safe to use from several threads: `ExpertLoad` has the lock.

    Totals are exact. The history holds totals of at most `MOST_MOMENTS` moments, at even steps; when it is full every other is
    left out and the step is made longer, so that it spans any time, and the counts between two moments are exact, too.

    Args:
        experts: E.
        window_tokens: a token that is n tokens old counts exp(-n / window_tokens) in the window; None for no window.
    """

    def __init__(self, experts: int, window_tokens: float | None = None) -> None:
        self.experts = experts
        self.window_tokens = window_tokens
        self.calls = self.tokens = self.dropped = self.invalid = 0
        self.counts: Totals = np.zeros(experts, np.int64)
        self.window = None if window_tokens is None else np.zeros(experts, np.float64)
        self.moments: list[Moment] = []
        self.step_seconds = FIRST_STEP_SECONDS
        self.due = -math.inf

    def add(self, counts: npt.NDArray[Any], tokens: int, dropped: int, seconds: float, calls: int = 1) -> None:
        """Counts [E] of calls with so many tokens, at a time."""
        self.calls += calls
        self.tokens += tokens
        self.dropped += dropped
        self.counts += counts
        if self.window is not None and self.window_tokens is not None:
            self.window *= math.exp(-tokens / self.window_tokens)
            self.window += counts
        if seconds >= self.due:
            self._remember(seconds)

    def _remember(self, seconds: float) -> None:
        self.moments.append(Moment(seconds, self.calls, self.counts.copy()))
        if len(self.moments) >= MOST_MOMENTS:
            self.moments = self.moments[:-1:2] + self.moments[-1:]
            self.step_seconds = max(2 * (seconds - self.moments[0].seconds) / MOST_MOMENTS, FIRST_STEP_SECONDS)
        self.due = seconds + self.step_seconds

    def intervals(self, most: int = 40) -> list[tuple[float, Totals]]:
        """(end, counts in it) of stretches of the history, each with at least 1 / most of all choices: few choices look uneven."""
        before, found = np.zeros(self.experts, np.int64), []
        least = max(int(self.counts.sum()) / most, 1)
        for moment in self.moments:
            if (moment.counts - before).sum() >= least:
                found.append((moment.seconds, moment.counts - before))
                before = moment.counts
        return found

    def summary(self, layer: str, recent: bool = False) -> Summary:
        """The numbers of the totals, or of the window."""
        counts: npt.NDArray[Any] = self.counts
        if recent:
            if self.window is None:
                raise InputError("there is no window: make ExpertLoad(window_tokens=...) to have one")
            counts = self.window
        some = bool(counts.sum() > 0)
        return Summary(
            layer=layer,
            experts=self.experts,
            calls=self.calls,
            tokens=self.tokens,
            choices=counts.sum().item(),
            dropped=self.dropped,
            invalid=self.invalid,
            entropy_bits=measures.entropy_bits(counts),
            evenness=measures.evenness(counts),
            imbalance=measures.imbalance(counts),
            variation=measures.variation(counts),
            gini=measures.gini(counts),
            dead=tuple(np.flatnonzero(self.counts == 0).tolist()),
            busiest=int(counts.argmax()) if some else None,
        )

    # ---------------------------------------------------------------- together, in and out

    def merge(self, other: LayerCounts) -> None:
        """Adds the counts of another process; windows are added, each as old as its own tokens make it."""
        self.moments = _merged(self.moments, other.moments)
        self.step_seconds = max(self.step_seconds, other.step_seconds)
        self.due = self.moments[-1].seconds + self.step_seconds if self.moments else -math.inf
        self.counts = self.counts + other.counts
        for name in ("calls", "tokens", "dropped", "invalid"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        if self.window is not None and other.window is not None:
            self.window = self.window + other.window

    def until(self, seconds: float) -> LayerCounts:
        """A copy whose history ends at a time."""
        made = LayerCounts(self.experts, self.window_tokens)
        made.merge(self)
        if made.moments and made.calls > made.moments[-1].calls:
            made.moments.append(Moment(max(seconds, made.moments[-1].seconds), made.calls, made.counts))
        return made

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "experts": self.experts,
            "calls": self.calls,
            "tokens": self.tokens,
            "dropped": self.dropped,
            "invalid": self.invalid,
            "counts": self.counts.tolist(),
            "window": None if self.window is None else self.window.tolist(),
            "history": [{"seconds": m.seconds, "calls": m.calls, "counts": m.counts.tolist()} for m in self.moments],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], window_tokens: float | None) -> LayerCounts:
        """What `to_dict` gave.

        Raises:
            ValueError, KeyError, TypeError: it did not give this; the message names the field.
        """
        counts = _counts(values["counts"], _whole(values, "experts"), "counts")
        made = cls(len(counts), window_tokens)
        made.counts = counts
        for name in ("calls", "tokens", "dropped", "invalid"):
            setattr(made, name, _whole(values, name))
        if window_tokens is not None:
            made.window = np.asarray(values["window"], np.float64)
            if made.window.shape != (made.experts,) or not (np.isfinite(made.window) & (made.window >= 0)).all():
                raise ValueError(f"window must be {made.experts} numbers, none below 0")
        made.moments = [
            Moment(float(m["seconds"]), _whole(m, "calls"), _counts(m["counts"], made.experts, "history"))
            for m in values["history"]
        ]
        if not all(math.isfinite(moment.seconds) for moment in made.moments):
            raise ValueError("history has a time that is no number")
        for before, after in itertools.pairwise(made.moments):
            if not before.seconds <= after.seconds or (before.counts > after.counts).any():
                raise ValueError("history goes backwards")
        if made.moments:
            made.step_seconds = max((made.moments[-1].seconds - made.moments[0].seconds) / MOST_MOMENTS, FIRST_STEP_SECONDS)
            made.due = made.moments[-1].seconds + made.step_seconds
        return made


def _merged(first: Sequence[Moment], second: Sequence[Moment]) -> list[Moment]:
    """The sums of two histories, at the moments of both, thinned."""
    if not first or not second:
        return list(first or second)
    at = sorted({moment.seconds for moment in (*first, *second)})
    a, b = _held(first, at), _held(second, at)
    summed = [Moment(t, x.calls + y.calls, x.counts + y.counts) for t, x, y in zip(at, a, b, strict=True)]
    while len(summed) >= MOST_MOMENTS:
        summed = summed[:-1:2] + summed[-1:]
    return summed


def _held(moments: Sequence[Moment], at: Sequence[float]) -> list[Moment]:
    """The latest moment at each time."""
    latest, left, found = Moment(0.0, 0, np.zeros_like(moments[0].counts)), list(moments), []
    for seconds in at:
        while left and left[0].seconds <= seconds:
            latest = left.pop(0)
        found.append(latest)
    return found


def _whole(values: Mapping[str, Any], name: str) -> int:
    value = values[name]
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{name}={value!r} must be a whole number, at least 0")
    return value


def _counts(values: Any, experts: int, name: str) -> Totals:
    if not isinstance(values, list) or len(values) != experts or not experts:
        raise ValueError(f"{name} must list a count for each of {experts} experts")
    whole = [_whole({name: value}, name) for value in values]
    if max(whole, default=0) >= 1 << 63:
        raise ValueError(f"{name} has a count over 2^63 - 1")
    return np.array(whole, np.int64)
