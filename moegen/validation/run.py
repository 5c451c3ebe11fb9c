"""The validation: one stage after the other, all layers in each, until all claims are judged or time is over."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import importlib.util
import math
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from .. import batch
from ..artifact import Artifact
from ..bench import results, workload
from ..bench.request import Subject
from ..display import brief
from ..errors import BuildError, MeasureError, MoegenError
from ..presets import weight_bytes
from ..toolchain import cxx
from . import fresh, page, proofs, speed
from .claims import CONFIDENCE, FAIL, QUIET_SHARE, Finding, Verdict, claims, judge
from .environment import environment
from .intervals import METHOD
from .limits import OutOfTime, time_limit
from .others import Others, disturbance
from .scope import Scope

KIND, SCHEMA_VERSION = "moegen-validation", 1
RESULT, BENCH, STORE = "validation.json", "bench.json", "store"
_PAGE_SECONDS = 12.0  # kept for the page
# What a stage takes for a layer on two slow processors.
_PROOF_SECONDS, _RUN_SECONDS = 10.0, 12.0
_RACE, _RACE_SECONDS = "benchmark", 45.0
_UNBUILT = "it was not built"
_BUILD_SHARE = 0.6  # of the time: what is built should be proven, too
# The claims of two stages.
_PROVEN = ("relative_l2", "elementwise", "routing")
_RUN = ("threads", "callers", "batch", "nan", "empty", "alone", "load", "first_call")


class Progress:
    """Is told how a validation goes; this one keeps quiet."""

    def stage(self, what: str) -> None:
        """A stage begins."""

    def detail(self, what: str) -> None:
        """What happens inside a stage."""


def validate(scope: Scope, folder: str | os.PathLike[str], progress: Progress | None = None) -> dict[str, Any]:
    """Validates, and writes the page and its data.

    Args:
        folder: where to; made when it is not there. `validation.json` is written after every stage.

    Returns:
        The document: environment, layers, verdicts on all claims, what was left out. When it is interrupted by Ctrl-C it ends
        with what there is, and `interrupted` is true.

    Raises:
        MeasureError: minutes or a number is out of range, or the folder cannot be written to.
    """
    if not scope.minutes > 0 or not math.isfinite(scope.minutes):
        raise MeasureError(f"minutes={scope.minutes:g} must be positive")
    out = pathlib.Path(folder)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / BENCH).unlink(missing_ok=True)
    except OSError as error:
        raise MeasureError(f"{str(out)!r} cannot be written to ({error.strerror}): give another folder") from None
    run = _Validation(scope, out, progress or Progress())
    try:
        run.stages()
    except KeyboardInterrupt:
        run.interrupt()
    return run.end()


class _Validation:
    def __init__(self, scope: Scope, out: pathlib.Path, progress: Progress) -> None:
        self.scope, self.out, self.progress = scope, out, progress
        self.start, self.others = time.monotonic(), Others()
        self.seed = int(np.random.default_rng().integers(2**31)) if scope.seed is None else scope.seed
        self.claims = claims(scope.subjects, scope.tokens)  # before anything is measured
        self.made: dict[str, Artifact] = {}
        self.findings: dict[str, dict[str, Finding]] = {subject.label: {} for subject in scope.subjects}
        self.missing = {subject.label: "not reached" for subject in scope.subjects}
        self.took: dict[str, float] = {}
        self.bench = results.new_document()
        self.document: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "kind": KIND,
            "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "minutes": scope.minutes,
            "seconds": None,
            "seed": self.seed,
            "method": _method(),
            "interrupted": False,
            "others": None,
            "left_out": [],
            "environment": environment(),
            "layers": [_layer(subject) for subject in scope.subjects],
            "verdicts": [],
            "bench": BENCH,
        }

    # ---------------------------------------------------------------- time

    def left(self) -> float:
        """Seconds until the page has to be written."""
        return 60 * self.scope.minutes - _PAGE_SECONDS - (time.monotonic() - self.start)

    def _timed(self, kind: str, subject: Subject, names: tuple[str, ...], work: Callable[[], None], least: float) -> None:
        """One layer's part of a stage, unless there is less time than the one before took (`least` for the first).

        Args:
            names: the claims that it is about.
        """
        label = subject.label
        if label not in self.made:
            return
        if self.left() < self.took.get(kind, least):
            self._leave_out(f"{kind} of {label}", label)
            return
        self.progress.stage(f"{kind}: {label}")
        began = time.monotonic()
        try:
            with time_limit(self.left()):
                work()
        except OutOfTime:
            self._leave_out(f"{kind} of {label}", label, "it took longer than there was time")
        except MoegenError as error:
            self.findings[label] |= {name: Finding(math.nan, str(error)) for name in names}
        if kind != _RACE:  # which ends when it has to
            self.took[kind] = time.monotonic() - began
        self._write()

    def _leave_out(self, what: str, label: str, why: str = "there was no time for it") -> None:
        self.document["left_out"].append(f"{what}: {why}")
        self.missing[label] = why

    # ---------------------------------------------------------------- stages

    def stages(self) -> None:
        """All of them."""
        self._build()
        for subject in self.scope.subjects:
            self._timed("proof", subject, _PROVEN, functools.partial(self._prove, subject), _PROOF_SECONDS)
        for subject in self.scope.subjects:
            self._timed("bit by bit", subject, _RUN, functools.partial(self._run, subject), _RUN_SECONDS)
        todo = [subject for subject in self.scope.subjects if subject.label in self.made]
        for index, subject in enumerate(todo):
            share = max(self.left() / (len(todo) - index), min(self.left(), _RACE_SECONDS))  # rather one whole than three begun
            self._timed(_RACE, subject, (), functools.partial(self._race, subject, share), _RACE_SECONDS / 2)

    def _build(self) -> None:
        self.made = {s.label: s.artifact for s in self.scope.subjects if s.artifact is not None}
        for label in self.made:
            self.findings[label]["build"] = Finding(None, "it was built already")
        todo = [subject for subject in self.scope.subjects if subject.artifact is None]
        if reason := _cannot_build():
            self.missing |= {subject.label: f"it cannot be built here: {reason}" for subject in todo}
            return
        if not todo:
            return
        self.progress.stage(f"building {', '.join(subject.label for subject in todo)}")
        self.missing |= {subject.label: _UNBUILT for subject in todo}
        label_of = {subject.config: subject.label for subject in todo}
        others = Others()
        outcomes = batch.build_many([s.config for s in todo], out=self.out / STORE, verify=False, force=True)
        with contextlib.suppress(OutOfTime), contextlib.closing(outcomes), time_limit(self.left() * _BUILD_SHARE):
            for outcome in outcomes:
                self._built(label_of[outcome.config], outcome)
                self._write()
        for label in label_of.values():
            if found := self.findings[label].get("build"):
                self.findings[label]["build"] = dataclasses.replace(found, disturbed=disturbance(others.share()))
        for label in set(label_of.values()) - set(self.findings_of("build")):
            self._leave_out(f"building {label}", label)

    def findings_of(self, name: str) -> list[str]:
        """Labels of the layers that have a finding for a claim."""
        return [label for label, found in self.findings.items() if name in found]

    def _built(self, label: str, outcome: batch.Outcome) -> None:
        if outcome.artifact is None:
            self.findings[label]["build"] = Finding(math.nan, str(outcome.error))
            return
        self.made[label], self.missing[label] = outcome.artifact, "not reached"
        self.findings[label]["build"] = Finding(outcome.seconds, f"{outcome.seconds:.1f} s, several at a time, without the proof")
        self._facts(label)["artifact"] = outcome.artifact.name
        self._facts(label)["target"] = str(outcome.artifact.target)
        self.progress.detail(f"{label} built in {outcome.seconds:.1f} s")

    def _prove(self, subject: Subject) -> None:
        report, found = proofs.numerics(self.made[subject.label], self.seed)
        self.findings[subject.label] |= found
        self._facts(subject.label)["proof"] = report

    def _run(self, subject: Subject) -> None:
        made = self.made[subject.label]
        with workload.temporary_folder(weight_bytes(subject.config)) as folder:
            workload.make(folder, subject.config, "uniform", self.seed)
            self.findings[subject.label] |= proofs.invariance(made, folder, self.seed)
            self.progress.detail("starting new processes")
            said, found = fresh.starts(made, folder, self.seed, self.scope.starts)
        self.findings[subject.label] |= found
        self._facts(subject.label)["starts"] = said

    def _race(self, subject: Subject, seconds: float) -> None:
        label, before = subject.label, len(self.bench["runs"])
        asked = speed.request(self.scope.tokens, self.scope.effort, self.seed, str(self.out / STORE))
        runner = dataclasses.replace(subject, artifact=self.made[label])
        try:
            complete = speed.measured(runner, asked, self.bench, seconds, self.progress.detail)
        except MoegenError as error:
            self._leave_out(f"benchmark of {label}", label, str(error))
            return
        finally:
            for run in self.bench["runs"][before:]:
                self._raced(label, run)
        if not complete:
            done = {point["tokens"] for run in self.bench["runs"][before:] for point in run["points"]}
            rest = ", ".join(f"T={t}" for t in self.scope.tokens if t not in done)
            self._leave_out(f"benchmark of {label} at {rest}", label)

    def _raced(self, label: str, run: dict[str, Any]) -> None:
        found = speed.findings(run)
        if not self.scope.judges_speed:
            small = "so small a layer says nothing about speed"
            found = {name: Finding(None, f"{small} ({finding.words})") for name, finding in found.items()}
        self.findings[label] |= found
        self._facts(label)["ratios"] = [
            {"tokens": point["tokens"], "contender": name, **interval.to_dict()}
            for point in run["points"]
            for name, interval in speed.ratios(point).items()
        ]

    # ---------------------------------------------------------------- the end

    def interrupt(self) -> None:
        """Ctrl-C: what is there stays."""
        self.document["interrupted"] = True
        self.document["left_out"].append("what came after the interrupt")
        for label, found in self.findings.items():
            if label in self.made or "build" not in found:
                self.missing[label] = "interrupted" if self.missing[label] in ("not reached", _UNBUILT) else self.missing[label]

    def end(self) -> dict[str, Any]:
        """Judges, and writes all files."""
        self.progress.stage("writing the page")
        self._write()
        page.write(self.document, self.bench, self.out)
        self.document["seconds"] = round(time.monotonic() - self.start, 1)
        self._write()
        return self.document

    def _write(self) -> None:
        self.document["verdicts"] = [verdict.to_dict() for verdict in self._verdicts()]
        self.document["seconds"] = round(time.monotonic() - self.start, 1)
        self.document["others"] = self.others.share()
        results.write_document(self.document, self.out / RESULT)
        if any(run["points"] for run in self.bench["runs"]):
            results.write_document(self.bench, self.out / BENCH)

    def _verdicts(self) -> list[Verdict]:
        return [judge(claim, self.findings[claim.layer], self.missing[claim.layer]) for claim in self.claims]

    def _facts(self, label: str) -> dict[str, Any]:
        found: dict[str, Any] = next(layer for layer in self.document["layers"] if layer["label"] == label)
        return found


def failed(document: dict[str, Any]) -> bool:
    """Whether a claim failed."""
    return any(verdict["status"] == FAIL for verdict in document["verdicts"])


def _method() -> str:
    waited = f"neither contender waited for a processor that other processes had for more than {QUIET_SHARE:.0%} of its turn"
    return f"{METHOD}, {CONFIDENCE:.0%} at least; a round counts when {waited}"


def _layer(subject: Subject) -> dict[str, Any]:
    made = subject.artifact
    return {
        "label": subject.label,
        "words": brief(subject.config),
        "config": subject.config.to_dict(),
        "weights_bytes": weight_bytes(subject.config),
        "artifact": made.name if made is not None else None,
        "target": str(made.target) if made is not None else None,
        "proof": None,
        "starts": [],
        "ratios": [],
    }


def _cannot_build() -> str:
    """What is missing for building, or nothing."""
    absent = [name for name in ("tvm", "jinja2") if importlib.util.find_spec(name) is None]
    if absent:
        return f"{', '.join(absent)} not installed: pip install 'moegen[build]'"
    try:
        cxx()
    except BuildError as error:
        return str(error)
    return ""
