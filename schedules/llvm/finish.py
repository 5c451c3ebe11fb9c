"""Rounding the float32 sums to the output's type."""

from __future__ import annotations

from typing import Any

from ._fixed import Knobs, check, default

__all__ = ["Knobs", "apply", "check", "default"]

LANES = 16


def apply(sch: Any, name: str, knobs: Knobs) -> None:
    """Tokens in parallel, 16 columns at a time."""
    token, column = sch.get_loops(sch.get_sblock("output", name))
    sch.parallel(token)
    if int(sch.get(column).extent) % LANES == 0:
        _, inner = sch.split(column, [None, LANES])
        sch.vectorize(inner)
