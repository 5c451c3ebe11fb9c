"""Before anything is measured: the layer at a size that fits into memory, and compiled."""

from __future__ import annotations

import os
import time

from .. import artifact as artifacts
from ..artifact import Artifact
from ..config import MoEConfig
from ..display import size
from ..errors import MeasureError
from ..machine import available_bytes
from ..presets import Fitted, fitted, weight_bytes
from .contenders.roster import weight_copies
from .request import Subject

_MEMORY_FRACTION = 0.8


def fit_into_memory(subject: Subject, families: dict[str, list[str]], memory_bytes: int | None) -> Fitted:
    """The layer as it can be measured here. Only presets are made smaller: a layer of the user's own is measured as it is.

    Args:
        families: who is to be measured, each with a copy of the weights.
        memory_bytes: memory that weights may take; None for most of what is available.

    Raises:
        MeasureError: the layer does not fit.
    """
    copies = weight_copies(families, subject.config)
    budget = memory_bytes if memory_bytes is not None else int(available_bytes() * _MEMORY_FRACTION)
    if subject.preset is not None and subject.artifact is None:
        return fitted(subject.config, copies, budget)
    needed = weight_bytes(subject.config) * copies
    if needed > budget:
        raise MeasureError(
            f"{subject.label} needs {size(round(needed))} for {copies:g} copies of its weights, {size(budget)} may be used: "
            "measure fewer contenders (--against) or allow more memory (--memory-gb)"
        )
    return Fitted(subject.config, {}, "")


def compiled(subject: Subject, config: MoEConfig, store: str | os.PathLike[str] | None) -> tuple[Artifact, float | None]:
    """The compiled layer, and how long building took; None when it was there.

    Raises:
        BuildError: it cannot be built.
    """
    if subject.artifact is not None:
        return subject.artifact, None
    from ..builder import build  # here, because measuring an artifact needs no compiler

    before = {a.path: a.manifest["manifest_sha256"] for a in artifacts.list_artifacts(store) if isinstance(a, Artifact)}
    start = time.perf_counter()
    made = build(config, out=store)
    seconds = time.perf_counter() - start
    return made, None if before.get(made.path) == made.manifest["manifest_sha256"] else seconds
