"""Stages that touch each element once: padding tokens, adding up the terms of a token's choices."""

from __future__ import annotations

from typing import Any

from .rewrites import Rewrite

THREADS = 256


def apply(sch: Any, name: str) -> list[Rewrite]:
    """One thread for each element; sums, where there are any, in its registers and in their order."""
    output = sch.get_sblock("output", name)
    token, column = sch.get_loops(output)
    tile, thread = sch.split(column, [None, THREADS])
    sch.bind(token, "blockIdx.x")
    sch.bind(tile, "blockIdx.y")
    sch.bind(thread, "threadIdx.x")
    names = {sch.get(b).name_hint for b in sch.get_child_blocks(sch.get_sblock("root", name))}
    if "total" in names:
        total = sch.get_sblock("total", name)
        sch.set_scope(total, 0, "local")
        sch.compute_at(total, thread, preserve_unit_loops=True)
        term = sch.get_loops(total)[-1]
        sch.decompose_reduction(total, term)
    return []
