"""What the lines of a journal say, and their provenance; `moegen.records` describes and reads them."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from .. import records
from ..config import MoEConfig
from ..errors import CandidateError
from ..records import Line
from ..target import Target
from . import kinds
from .times import Measured, geometric_mean, ratio


@dataclasses.dataclass(frozen=True)
class Scribe:
    """Writes the lines of one layer and regime.

    Args:
        config: the layer.
        target: what it is compiled for.
        regime: one of `choices.REGIMES`.
        threads: of the measured layers.
        seed: of the search and of the workload.
        processor: that measured, or device, which may be another machine's.
        facts: sizes of it that records keep.
    """

    config: MoEConfig
    target: Target
    regime: str
    threads: int
    seed: int
    processor: str
    facts: Mapping[str, Any]

    def trial(
        self, number: int, knobs: Mapping[str, int], outcome: Sequence[Measured] | CandidateError, seconds: float, usual: float
    ) -> Line:
        """A candidate and what became of it.

        Args:
            seconds: what the trial took.
            usual: time of the default in the null measurement. The candidate's is that times its ratio, so that trials can be
                compared, whatever the state of the machine was in each; the samples are as they were.
        """
        line = {**self._common("trial"), "trial": number, "knobs": dict(knobs), "trial_seconds": round(seconds, 2)}
        if isinstance(outcome, CandidateError):
            return line | {"status": outcome.status, "reason": str(outcome), "seconds": None, "default_seconds": usual}
        found = _times(outcome)
        compared = {"seconds": usual * found["ratio"], "default_seconds": usual}
        return line | {"status": "correct", "reason": None} | found | compared

    def null(self, points: Sequence[Measured]) -> Line:
        """The default beside its copy."""
        return self._common("null") | _times(points)

    def decision(
        self,
        better: bool,
        reason: str,
        knobs: Mapping[str, int],
        points: Sequence[Measured],
        null: Line,
        trials: Mapping[str, int],
        own: Sequence[int],
    ) -> Line:
        """The end of a search.

        Args:
            better: the knobs replace the default.
            points: at which the knobs were measured again; none when nothing came near to the default.
            null: the line of the null measurement.
            trials: status -> how many.
            own: numbers of tokens of the regime itself; the others are those of other regimes.
        """
        line = self._common("decision") | {"better": better, "reason": reason, "knobs": dict(knobs)}
        line |= _times([point for point in points if point.tokens in own]) if points else {"ratio": None, "band": None}
        line |= {"points": [point.to_dict() for point in points], "trials": dict(trials), "own_tokens": list(own)}
        line |= {"null": {"ratio": null["ratio"], "band": null["band"]}}
        return line | {"id": hashlib.sha256(json.dumps(line, sort_keys=True).encode()).hexdigest()[:12]}

    def verdict(self, decision: Line, holds: bool, reason: str, points: Sequence[Measured]) -> Line:
        """Whether a decision from elsewhere holds here."""
        times = _times(points) if points else {"ratio": None, "band": None, "points": []}
        return self._common("verdict") | {"decision": decision["id"], "holds": holds, "reason": reason} | times

    def same_run(self, line: Line) -> bool:
        """Whether a line was measured under the circumstances of this run, so that it need not be measured again."""
        return all(line.get(name) == self._circumstances[name] for name in ("layer", "target", "regime", "provenance", "threads"))

    def _common(self, kind: str) -> dict[str, Any]:
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        return {"schema_version": records.SCHEMA_VERSION, "kind": kind, "created": now, **self._circumstances}

    @functools.cached_property
    def _circumstances(self) -> dict[str, Any]:
        kind = kinds.of(self.target)
        return {
            "regime": self.regime,
            "layer": records.layer_of(self.config),
            "target": self.target.slug,
            "provenance": dataclasses.asdict(kind.provenance()) | {"processor": self.processor},
            "versions": kind.versions(),
            "threads": self.threads,
            **self.facts,
            "seed": self.seed,
        }


def _times(points: Sequence[Measured]) -> dict[str, Any]:
    """Times of a call, as geometric means over the points, and the points with their samples."""
    found = ratio(points)
    usual = geometric_mean([point.default_seconds for point in points])
    return {
        "seconds": usual * found.value,
        "default_seconds": usual,
        "ratio": found.value,
        "band": found.band,
        "points": [point.to_dict() for point in points],
    }
