"""Products for a few tokens: every column's dot product by a handful of neighbouring threads, straight from global memory.

Weights are read once, 16 bytes a thread and 128 bytes of a row together; nothing waits for dispatch.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from moegen.cuda_geometry import COPY_BYTES, K_MULTIPLE
from moegen.errors import ScheduleError

from .rewrites import Rewrite


@dataclasses.dataclass(frozen=True)
class Knobs:
    """Choices of a product for a few tokens.

    Args:
        columns: output columns of a thread block.
        unroll: steps of the dot product whose loads are under way together.
    """

    columns: int = 16
    unroll: int = 4


def check(knobs: Knobs) -> None:
    """Legality.

    Raises:
        ScheduleError: a number is out of range.
    """
    if knobs.columns not in (4, 8, 16, 32, 64):
        raise ScheduleError(f"columns={knobs.columns} must be 4, 8, 16, 32 or 64")
    if knobs.unroll not in (1, 2, 4, 8, 16):
        raise ScheduleError(f"unroll={knobs.unroll} must be 1, 2, 4, 8 or 16")


def space() -> tuple[Knobs, ...]:
    """Everything worth trying."""
    return tuple(Knobs(columns, unroll) for columns in (8, 16, 32, 64) for unroll in (2, 4, 8))


def lanes_of(item_bytes: int) -> int:
    """Threads that share a dot product: as many as read 64 of its terms."""
    return K_MULTIPLE * item_bytes // COPY_BYTES


def apply(sch: Any, name: str, knobs: Knobs, item_bytes: int, row_copy: int) -> list[Rewrite]:
    """Thread blocks own columns of one token (and choice); a column's sums are added up across the threads that made them.

    Args:
        row_copy: elements of a row that one load may read.
    """
    check(knobs)
    return dot_products(sch, name, knobs.columns, lanes_of(item_bytes), knobs.unroll, item_bytes, row_copy)


def dot_products(sch: Any, name: str, columns: int, lanes: int, unroll: int, item_bytes: int, row_copy: int) -> list[Rewrite]:
    """`apply` for any number of lanes, the threads that share a dot product."""
    output = sch.get_sblock("output", name)
    loops = sch.get_loops(output)
    tile, column = sch.split(loops[-1], [None, columns])
    sch.reorder(*loops[:-1], tile, column)
    tokens = sch.fuse(*loops[:-1])
    sch.bind(tokens, "blockIdx.x")
    sch.bind(tile, "blockIdx.y")
    sch.bind(column, "threadIdx.y")
    names = {sch.get(b).name_hint for b in sch.get_child_blocks(sch.get_sblock("root", name))}
    together = COPY_BYTES // item_bytes
    for prefix in ("", "shared_"):
        if f"{prefix}total" in names:
            blocks = {part: sch.get_sblock(f"{prefix}{part}", name) for part in ("total", "rows", "columns")}
            _sum(sch, blocks, column, lanes, unroll, together, row_copy)
    return []


def _sum(sch: Any, blocks: dict[str, Any], column: Any, lanes: int, unroll: int, together: int, row_copy: int) -> None:
    total = blocks["total"]
    sch.set_scope(total, 0, "local")
    sch.compute_at(total, column, preserve_unit_loops=True)
    *outer, k = sch.get_loops(total)[3:]
    steps = int(sch.get(k).extent) // (lanes * together)
    unroll = max(n for n in range(1, unroll + 1) if steps % n == 0)
    step, unrolled, lane, term = sch.split(k, [None, unroll, lanes, together])
    sch.reorder(*outer, lane, step, unrolled, term)
    sch.bind(lane, "threadIdx.x")
    sch.annotate(step, "disable_unroll", True)  # by NVIDIA's compiler, which would begin more loads than there are registers for
    for source, at_once in (("rows", row_copy), ("columns", together)):
        load = blocks[source]
        sch.set_scope(load, 0, "local")
        sch.compute_at(load, unrolled, preserve_unit_loops=True)
        *around, vector = sch.get_loops(load)[3 + len(outer) + 3 :]
        several, vector = sch.split(vector, [None, at_once])
        sch.vectorize(vector)
        for loop in (*around, several):
            sch.unroll(loop)
    sch.unroll(unrolled)
    sch.unroll(term)
