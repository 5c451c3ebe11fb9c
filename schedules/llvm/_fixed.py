"""What stages without choices share."""

from __future__ import annotations

import dataclasses

from moegen.geometry import Geometry
from moegen.target import Target


@dataclasses.dataclass(frozen=True)
class Knobs:
    """Nothing to choose."""


def default(geometry: Geometry, target: Target) -> Knobs:
    """The only knobs there are."""
    return Knobs()


def check(geometry: Geometry, target: Target, knobs: Knobs) -> None:
    """Always legal."""
