"""Rounding the float32 sums to the output's type."""

from __future__ import annotations

from typing import Any

from moegen.geometry import Geometry

from ..rewrites import Rewrite
from ._fixed import Knobs, check, default

__all__ = ["Knobs", "apply", "check", "default"]

LANES = 16
TOKENS = 16


def apply(sch: Any, name: str, geometry: Geometry, knobs: Knobs) -> list[Rewrite]:
    """A few tokens at a time in parallel, so that a panel is read in whole cache lines."""
    token, column = sch.get_loops(sch.get_sblock("output", name))
    several, token = sch.split(token, [None, TOKENS])
    if int(sch.get(column).extent) % LANES == 0:
        column, inner = sch.split(column, [None, LANES])
        sch.reorder(several, column, token, inner)
        sch.vectorize(inner)
    sch.parallel(several)
    return []
