"""Verdicts: whether what was found elsewhere (another processor, compiler or schedules) still beats the default here."""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Iterator

from .. import choices, records
from ..config import MoEConfig
from ..errors import CandidateError, MoegenError
from ..records import Line
from ..target import Target
from . import kinds
from .journal import Journal
from .lines import Scribe
from .session import judged
from .stand import Effort, Stand, open_stand
from .times import Measured

_EFFORT = Effort(processes=2)


def settle(config: MoEConfig, target: Target, logs: str | os.PathLike[str] | None = None) -> Iterator[str]:
    """Measures the decisions that are open for a layer, once; yields a sentence for each. Verdicts go to the user's records.

    A layer that cannot be measured here keeps the default, and the sentence says why.
    """
    kind = kinds.of(target)
    pending = records.choose(config, target.slug, choices.REGIMES, kind.provenance(), logs).open
    if not pending or not kind.runs_here(target):
        return
    with contextlib.ExitStack() as stack:
        try:
            stand = stack.enter_context(open_stand(config, target, kind.threads(None), effort=_EFFORT))
        except MoegenError as error:
            yield f"tuning records of {records.layer_name(records.layer_of(config))} are not used: {error}"
            return
        for decision in pending:
            yield _settled(stand, decision, records.user_folder(logs))


def _settled(stand: Stand, decision: Line, folder: pathlib.Path) -> str:
    """One decision beside the default, at the points of its regime."""
    regime = str(decision["regime"])
    scribe = Scribe(stand.config, stand.target, regime, stand.threads, stand.seed, stand.processor, stand.facts)
    origin = " and ".join(kinds.of(stand.target).provenance().differs_in(decision["provenance"]))
    name = f"the tuning record for {regime} rows per expert (from {origin})"
    try:
        with Journal(records.file_of(folder, stand.target.slug, decision["layer"], regime)) as journal:
            holds, reason, points = _measured(stand, decision)
            journal.append(scribe.verdict(decision, holds, reason, points))
    except MoegenError as error:
        return f"{name} is not used: {error}"
    return f"{name} {'is used' if holds else 'is not used'}: {reason}"


def _measured(stand: Stand, decision: Line) -> tuple[bool, str, list[Measured]]:
    regime = str(decision["regime"])
    (built,) = stand.build(regime, [decision["knobs"]])
    if isinstance(built, CandidateError):
        return False, f"it cannot be built here: {built}", []
    try:
        points = stand.measure(built, [regime], stand.effort.processes)
    except CandidateError as failure:
        return False, f"it fails here: {failure}", []
    holds, reason = judged(points, stand.tokens([regime]), decision["null"]["band"])
    return holds, reason, points
