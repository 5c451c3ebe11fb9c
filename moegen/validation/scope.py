"""How much is validated: which layers, with how much effort."""

from __future__ import annotations

import dataclasses

from ..bench.request import Effort, Subject
from .claims import QUIET_SHARE
from .layers import QUICK_SUBJECTS, SUBJECTS

# Twenty quiet rounds where the machine is quiet enough for that.
EFFORT = Effort(rounds=36, min_ms=20.0, most_seconds=3.0, patience_seconds=60.0, quiet_rounds=20, quiet_share=QUIET_SHARE)


@dataclasses.dataclass(frozen=True)
class Scope:
    """How much is validated.

    Args:
        minutes: most time that it takes; what does not fit is left out and named.
        subjects: the layers; those with an artifact are not built.
        tokens: T of the calls that are timed.
        starts: new processes for each layer.
        effort: of the benchmark.
        seed: of weights and inputs; None draws one.
        judges_speed: whether the layers are large enough that claims about speed are judged.
    """

    minutes: float = 5.0
    subjects: tuple[Subject, ...] = SUBJECTS
    tokens: tuple[int, ...] = (1, 256)
    starts: int = 5
    effort: Effort = EFFORT
    seed: int | None = None
    judges_speed: bool = True


def quick(minutes: float = 5.0, seed: int | None = None) -> Scope:
    """All stages with tiny layers and little effort: shows that everything runs here, not how fast."""
    effort = Effort(rounds=8, min_ms=1.0, most_seconds=0.5, patience_seconds=60.0)
    return Scope(minutes, QUICK_SUBJECTS, tokens=(4,), starts=1, effort=effort, seed=seed, judges_speed=False)
