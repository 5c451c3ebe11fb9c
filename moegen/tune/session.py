"""A tuning run: for each regime of a layer a search, a decision and its records.

Trials are kept as they come, so that the same command goes on where an interrupted one was. At the end the best few are measured
again in fresh processes, because the best of many measurements is partly the luckiest; what is then not clearly faster than the
default, or slower than it anywhere, changes nothing.
"""

from __future__ import annotations

import collections
import dataclasses
import os
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

from .. import choices, records
from ..config import MoEConfig
from ..errors import CandidateError, MeasureError
from ..records import Line
from ..target import Target
from . import kinds
from .journal import Journal
from .lines import Scribe
from .places import Place
from .search import BATCH, Search
from .stand import Effort, Stand, open_stand
from .times import Measured, ratio

_FINALISTS = 3


@dataclasses.dataclass(frozen=True)
class Request:
    """What to tune and how.

    Args:
        config: the layer.
        target: what it is compiled for.
        regimes: some of `choices.REGIMES`.
        trials: candidates to measure for each regime.
        exhaustive: measure all candidates, however many.
        threads: of the measured layers, on CPUs; None for all processors.
        seed: of the search and of the workload.
        logs: the user's records, as in `records.user_folder`.
        effort: how long to measure.
    """

    config: MoEConfig
    target: Target
    regimes: tuple[str, ...] = choices.REGIMES
    trials: int = 64
    exhaustive: bool = False
    threads: int | None = None
    seed: int = 0
    logs: str | os.PathLike[str] | None = None
    effort: Effort = dataclasses.field(default_factory=Effort)


class Watch:
    """Is told how a run goes; this one keeps quiet."""

    def say(self, text: str) -> None:
        """Something to know, in one line."""

    def stage(self, what: str) -> None:
        """`what` begins."""

    def regime(self, name: str, total: int, done: Sequence[Line]) -> None:
        """A search of `total` trials begins, of which some were done before."""

    def trial(self, line: Line) -> None:
        """A trial was recorded."""

    def decided(self, line: Line) -> None:
        """A regime's search is over."""


def tune(asked: Request, watch: Watch | None = None, places: Sequence[Place] = ()) -> list[Line]:
    """Tunes a layer; returns the decision of each regime.

    Args:
        places: where to measure; this machine when there are none.

    Raises:
        MeasureError, TargetError, BuildError: it cannot be measured.
        RecordError: another run writes the same records, or they cannot be written.
    """
    seen = watch or Watch()
    threads = _check(asked)
    folder, layer = records.user_folder(asked.logs), records.layer_of(asked.config)
    journals = []
    try:
        for regime in asked.regimes:
            journals.append(Journal(records.file_of(folder, asked.target.slug, layer, regime)))
        seen.stage("drawing weights and building the default")
        with open_stand(asked.config, asked.target, threads, asked.seed, asked.effort, places) as stand:
            return [
                _Regime(
                    asked,
                    Scribe(asked.config, asked.target, regime, threads, asked.seed, stand.processor, stand.facts),
                    stand,
                    journal,
                    seen,
                ).decide()
                for regime, journal in zip(asked.regimes, journals, strict=True)
            ]
    finally:
        for journal in journals:
            journal.close()


def _check(asked: Request) -> int:
    if unknown := [regime for regime in asked.regimes if regime not in choices.REGIMES]:
        raise MeasureError(f"regime={unknown[0]!r} must be one of {', '.join(choices.REGIMES)}")
    threads = kinds.of(asked.target).threads(asked.threads)
    if asked.trials < 1:
        raise MeasureError(f"trials={asked.trials} must be at least 1")
    return threads


class _Regime:
    """One regime of a run."""

    def __init__(self, asked: Request, scribe: Scribe, stand: Stand, journal: Journal, watch: Watch) -> None:
        self.asked, self.scribe, self.stand, self.journal, self.watch = asked, scribe, stand, journal, watch
        self.name = scribe.regime
        self.space = kinds.of(asked.target).space(asked.config, asked.target, self.name)
        self.search = Search(self.space.candidates, self.space.default, asked.seed)
        self.trials = [line for line in self._earlier() if line["kind"] == "trial"]
        for line in self.trials:
            self.search.learn(line["knobs"], line.get("ratio"))

    def _earlier(self) -> list[Line]:
        """Lines of this very run, from before it was interrupted."""
        same = [line for line in self.journal.lines if self.scribe.same_run(line)]
        if not same and any(line["kind"] == "trial" for line in self.journal.lines):
            self.watch.say(
                f"{self.name}: earlier trials are from other schedules, another compiler or another machine: starting anew"
            )
        return same

    def decide(self) -> Line:
        """Searches, measures the best again, and records what came of it."""
        self.watch.stage(f"{self.name}: the default beside its own copy")
        null = self._null()
        before = len(self.trials)
        self._run(null)
        if len(self.trials) == before and (known := self._same("decision")):
            line = known[-1]
        else:
            self.watch.stage(f"{self.name}: the best again")
            line = self._final(null)
            self.journal.append(line)
        self.watch.decided(line)
        return line

    def _null(self) -> Line:
        if not self._same("null"):
            self.journal.append(self.scribe.null(self._try_default()))
        return self._same("null")[-1]

    def _same(self, kind: str) -> list[Line]:
        return [line for line in self.journal.lines if line["kind"] == kind and self.scribe.same_run(line)]

    def _try_default(self) -> list[Measured]:
        try:
            return self.stand.measure(self.stand.copy_of_default(), [self.name], self.asked.effort.processes)
        except CandidateError as failure:
            raise MeasureError(f"the default itself cannot be measured ({failure.status}): {failure}") from failure

    def _run(self, null: Line) -> None:
        """Trials until there are as many as were asked for, or no candidates left."""
        possible = len(self.space.candidates) - (self.space.default in self.space.candidates)
        total = possible if self.asked.exhaustive else min(self.asked.trials, possible)
        self.watch.regime(self.name, total, self.trials)
        while len(self.trials) < total and (batch := self.search.next(min(BATCH, total - len(self.trials)))):
            start = time.perf_counter()
            built = self.stand.build(self.name, batch)
            shared = (time.perf_counter() - start) / len(batch)
            start = time.perf_counter()
            for candidate, artifact, outcome in zip(batch, built, self.stand.measure_each(built, self.name), strict=True):
                took = shared + time.perf_counter() - start
                self._keep(self.scribe.trial(len(self.trials), candidate, outcome, took, null["default_seconds"]))
                if isinstance(artifact, pathlib.Path):
                    self.stand.workshop.remove(artifact)
                start = time.perf_counter()

    def _keep(self, line: Line) -> None:
        self.journal.append(line)
        self.trials.append(line)
        self.search.learn(line["knobs"], line.get("ratio"))
        self.watch.trial(line)

    # ---------------------------------------------------------------- the decision

    def _final(self, null: Line) -> Line:
        statuses = collections.Counter(str(line["status"]) for line in self.trials)
        own = self.stand.tokens([self.name])
        best = self._best_again(self.search.best(_FINALISTS))
        if best is None:
            return self.scribe.decision(False, "no candidate was faster than the default", {}, [], null, statuses, own)
        knobs, artifact = best
        try:
            points = self.stand.measure(artifact, choices.REGIMES, self.asked.effort.processes)
        except CandidateError as failure:
            return self.scribe.decision(False, f"the best candidate failed: {failure}", {}, [], null, statuses, own)
        better, reason = judged(points, own, null["band"])
        return self.scribe.decision(better, reason, knobs, points, null, statuses, own)

    def _best_again(self, candidates: Sequence[Mapping[str, int]]) -> tuple[Mapping[str, int], pathlib.Path] | None:
        """The best of some candidates by a measurement of its own, which the decision does not use."""
        if not candidates:
            return None
        found: list[tuple[float, int, pathlib.Path]] = []
        built = self.stand.build(self.name, candidates)
        for index, artifact in enumerate(built):
            try:
                if isinstance(artifact, CandidateError):
                    continue
                found.append((ratio(self.stand.measure(artifact, [self.name], processes=2)).value, index, artifact))
            except CandidateError:
                continue
        if not found:
            return None
        _, index, artifact = min(found)
        return candidates[index], artifact


def judged(points: Sequence[Measured], own: Sequence[int], null_band: Sequence[float]) -> tuple[bool, str]:
    """Whether a candidate replaces the default, and why.

    Args:
        points: where it was measured.
        own: numbers of tokens of its regime, where it has to be faster; at the others it may not be slower.
        null_band: what the default reaches beside its own copy.
    """
    whole = ratio([point for point in points if point.tokens in own])
    slower = [point for point in points if ratio([point]).low > 1 and ratio([point]).value > null_band[1]]
    if slower:
        worst = max(slower, key=lambda point: ratio([point]).value)
        percent = 100 * (ratio([worst]).value - 1)
        return False, f"it is {percent:.1f} % slower than the default at {worst.tokens} tokens, {worst.routing} routing"
    if whole.value >= 1:
        return False, "it is not faster than the default"
    if whole.high >= 1 or whole.value >= min(1.0, null_band[0]):
        return False, f"its gain of {100 * (1 - whole.value):.1f} % is within the noise"
    return True, f"{100 * (1 - whole.value):.1f} % less time than the default"


def summary(line: Line) -> dict[str, Any]:
    """A decision without its samples."""
    left_out = ("points", "null", "provenance", "versions", "layer")
    return {name: value for name, value in line.items() if name not in left_out} | {
        "points": [{name: value for name, value in point.items() if name != "samples"} for point in line["points"]]
    }
