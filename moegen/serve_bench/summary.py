"""What a run's outcomes come to: rates, latencies, failures by kind, and the share of requests that met an objective.

Percentiles interpolate linearly between the two nearest ranks (Hyndman and Fan's type 7, NumPy's default). Latencies are those of
requests that succeeded, and the success rate stands beside them. A percentile of fewer samples than it needs to have one beyond
it (20 for P95, 100 for P99) is little but the largest sample: `thin` names such percentiles.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from .outcomes import FAILED, OK, UNFINISHED, Outcome, Played

PERCENTILES = {"p50": 50, "p95": 95, "p99": 99}
LATENCIES = ("wait", "ttft", "tpot", "itl", "e2e")
_CURVE = np.linspace(0, 100, 101)


@dataclasses.dataclass(frozen=True)
class Objective:
    """What a request has to keep to be counted as good (a service level objective); None where anything goes.

    Args:
        ttft_s: most seconds to the first token.
        tpot_s: most seconds per token after the first.
        e2e_s: most seconds in all.
    """

    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None

    def __bool__(self) -> bool:
        return any(limit is not None for limit in dataclasses.astuple(self))

    def met_by(self, outcome: Outcome) -> bool:
        """Whether a request succeeded in time; one of a single token has no time per token to miss."""
        if outcome.status != OK:
            return False
        times = (outcome.first_token_s, outcome.per_token_s, outcome.latency_s)
        limits = dataclasses.astuple(self)
        return all(limit is None or time is None or time <= limit for time, limit in zip(times, limits, strict=True))


def summarise(turns: Sequence[Played], objective: Objective) -> dict[str, Any]:
    """The summary of one or more runs of a target, as `moegen.serve_bench.results` describes it."""
    outcomes = [outcome for turn in turns for outcome in turn.outcomes]
    seconds = sum(turn.seconds for turn in turns)
    good = [outcome for outcome in outcomes if outcome.status == OK]
    ended = [outcome for outcome in outcomes if outcome.status != UNFINISHED]
    prompt, output = (sum(getattr(o, f"{name}_tokens") for o in good) for name in ("prompt", "output"))
    met = sum(map(objective.met_by, outcomes))
    return {
        "requests": len(outcomes),
        "succeeded": len(good),
        "failed": len(ended) - len(good),
        "unfinished": len(outcomes) - len(ended),
        "success_rate": len(good) / len(ended) if ended else None,
        "failures": failures(outcomes),
        "seconds": seconds,
        "requests_per_s": _rate(len(good), seconds),
        "output_tokens_per_s": _rate(output, seconds),
        "tokens_per_s": _rate(prompt + output, seconds),
        "prompt_tokens": prompt,
        "output_tokens": output,
        "most_in_flight": max((most_in_flight(turn.outcomes) for turn in turns), default=0),
        "goodput": {"requests_per_s": _rate(met, seconds), "share": met / len(ended) if ended else None} if objective else None,
        "latency": {name: spread(samples) for name, samples in latencies(good).items()},
    }


def latencies(good: Iterable[Outcome]) -> dict[str, list[float]]:
    """Samples of each latency, of requests that succeeded."""
    kept = list(good)
    return {
        "wait": [o.wait_s for o in kept],
        "ttft": [o.first_token_s for o in kept],
        "tpot": [o.per_token_s for o in kept if o.per_token_s is not None],
        "itl": [gap for o in kept for gap in o.gaps_s()],
        "e2e": [o.latency_s for o in kept],
    }


def spread(samples: Sequence[float]) -> dict[str, Any] | None:
    """A latency's statistics; None without samples."""
    if not samples:
        return None
    values = np.asarray(samples, np.float64)
    found = dict(zip(PERCENTILES, map(float, np.percentile(values, list(PERCENTILES.values()))), strict=True))
    return {
        "count": len(values),
        "mean": float(values.mean()),
        **found,
        "min": float(values.min()),
        "max": float(values.max()),
        "thin": [name for name, share in PERCENTILES.items() if len(values) * (100 - share) < 100],
        "curve": [float(value) for value in np.percentile(values, _CURVE)],
    }


def failures(outcomes: Iterable[Outcome]) -> list[dict[str, Any]]:
    """Failures by kind, the most frequent first, each with one of its sentences."""
    bad = [outcome for outcome in outcomes if outcome.status == FAILED]
    counts = collections.Counter(outcome.kind for outcome in bad)
    said = {outcome.kind: outcome.error for outcome in reversed(bad)}
    return [{"kind": kind, "count": count, "example": said[kind]} for kind, count in counts.most_common()]


def most_in_flight(outcomes: Sequence[Outcome]) -> int:
    """The most requests that were due and not yet ended at one time."""
    return max((count for _, count in in_flight(outcomes)), default=0)


def in_flight(outcomes: Sequence[Outcome]) -> list[tuple[float, int]]:
    """(seconds, requests due and not ended from then on), in order of time; an end comes before a beginning of the same time."""
    last = max((t for o in outcomes for t in (o.due_s, o.ended_s) if t is not None), default=0.0)
    changes = [(o.due_s, 1) for o in outcomes] + [(o.ended_s if o.ended_s is not None else last, -1) for o in outcomes]
    counts, steps = 0, []
    for at, change in sorted(changes):
        counts += change
        steps.append((at, counts))
    return steps


def _rate(count: int, seconds: float) -> float | None:
    return count / seconds if seconds > 0 else None
