"""Gathering rows into tile order: one copy of 16 values at a time, so that the products read one stream per row."""

from __future__ import annotations

import math
from typing import Any

from moegen.geometry import Geometry

from ..rewrites import Rewrite
from ._fixed import Knobs, check, default

__all__ = ["Knobs", "apply", "check", "default"]

CHUNKS = 8


def apply(sch: Any, name: str, geometry: Geometry, knobs: Knobs) -> list[Rewrite]:
    """A few chunks of every row of a block at a time: reads come in whole cache lines, writes stay in the first-level cache."""
    block, chunk, row, lanes = sch.get_loops(sch.get_sblock("packed", name))
    together = math.gcd(geometry.router.k_chunks, CHUNKS)
    some, chunk = sch.split(chunk, [None, together])
    sch.reorder(block, some, row, chunk, lanes)
    sch.vectorize(lanes)
    return []
