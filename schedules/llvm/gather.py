"""Gathering rows into tile order: one copy of 16 values at a time, so that the products read one stream per row."""

from __future__ import annotations

from typing import Any

from ._fixed import Knobs, check, default

__all__ = ["Knobs", "apply", "check", "default"]


def apply(sch: Any, name: str, knobs: Knobs) -> None:
    """Rows in parallel, a vector of 16 values inside."""
    block, chunk, row, lanes = sch.get_loops(sch.get_sblock("packed", name))
    sch.reorder(block, row, chunk, lanes)
    sch.vectorize(lanes)
    sch.parallel(sch.fuse(block, row))
