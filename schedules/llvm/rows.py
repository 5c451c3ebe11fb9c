"""Rows of bytes: a row's scale from its largest value, then its codes, a vector of values at a time."""

from __future__ import annotations

from typing import Any

from moegen.geometry import Geometry

from ..rewrites import Rewrite
from ._fixed import Knobs, check, default

__all__ = ["Knobs", "apply", "check", "default"]

LANES = 16


def apply(sch: Any, name: str, geometry: Geometry, knobs: Knobs) -> list[Rewrite]:
    """Row after row; the host gives rows to threads."""
    if name == "gather_bytes":
        block, chunk, row, lanes = sch.get_loops(sch.get_sblock("packed", name))
        sch.reorder(block, row, chunk, lanes)
        sch.vectorize(lanes)
        return []
    row = sch.get_loops(sch.get_sblock("scale", name))[-1]
    part = sch.get_sblock("part", name)
    for stage in (sch.get_sblock("size", name), part):
        sch.compute_at(stage, row, preserve_unit_loops=True)
    *_, lanes, reduced = sch.get_loops(part)
    sch.reorder(reduced, lanes)
    sch.vectorize(lanes)
    sch.decompose_reduction(part, reduced)
    *_, column = sch.get_loops(sch.get_sblock("codes", name))
    if name == "quantize":
        _, column = sch.split(column, [None, LANES])
    sch.vectorize(column)
    return []
