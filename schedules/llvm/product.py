"""The register-tiled product: the sums of one row tile and panel stay in vector registers over a block of the dot product."""

from __future__ import annotations

import dataclasses
from typing import Any

from moegen.errors import ScheduleError
from moegen.geometry import Geometry
from moegen.target import Target


@dataclasses.dataclass(frozen=True)
class Knobs:
    """Choices of one product.

    Args:
        k_unroll: how many terms of the dot product are unrolled.
    """

    k_unroll: int = 1


def default(geometry: Geometry, target: Target) -> Knobs:
    """No unrolling: the tile itself has enough independent sums."""
    return Knobs()


def check(geometry: Geometry, target: Target, knobs: Knobs) -> None:
    """Legality.

    Raises:
        ScheduleError: the unrolling does not divide a row chunk.
    """
    if knobs.k_unroll not in (1, 2, 4):
        raise ScheduleError(f"k_unroll={knobs.k_unroll} must be 1, 2 or 4")


def tile(sch: Any, name: str, epilogue_block: Any, knobs: Knobs) -> None:
    """Schedules `partial` and `total` of function `name` under loop `epilogue_block`: one row tile and panel an iteration."""
    partial, total = sch.get_sblock("partial", name), sch.get_sblock("total", name)
    for block in (partial, total):
        sch.set_scope(block, 0, "local")
    sch.compute_at(total, epilogue_block, preserve_unit_loops=True)
    rows, vectors, lanes, block_axis = sch.get_loops(total)[-4:]
    sch.reorder(block_axis, rows, vectors, lanes)
    sch.compute_at(partial, block_axis, preserve_unit_loops=True)
    p_rows, p_vectors, p_lanes, chunk, term = sch.get_loops(partial)[-5:]
    sch.reorder(chunk, term, p_rows, p_vectors, p_lanes)
    if knobs.k_unroll > 1:
        _, inner = sch.split(term, [None, knobs.k_unroll])
        sch.unroll(inner)
    for loop in (rows, vectors, p_rows, p_vectors):
        sch.unroll(loop)
    for loop in (lanes, p_lanes):
        sch.vectorize(loop)
    sch.decompose_reduction(partial, chunk)
    sch.decompose_reduction(total, block_axis)


def finish_tile(sch: Any, loops: list[Any]) -> None:
    """The epilogue's own loops (rows, [vectors,] lanes): rows stay a loop, which reads the sums back from the stack.

    Unrolling them too would save one round trip through the first-level cache per tile and multiply the code by the rows.
    """
    for loop in loops[1:-1]:
        sch.unroll(loop)
    sch.vectorize(loops[-1])
