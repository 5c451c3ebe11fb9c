"""The tiled products: rows gathered into shared memory by asynchronous copies, sums in registers, the epilogue on them.

A warp's tile is cut so that the rows and columns of a thread are neighbours and its sums are exactly those that `mma.sync` gives it
(PTX ISA, fragments of m16n8k16): the same nest is a product of scalars or, with `Multiply`, of tensor cores, and a thread stores
neighbouring columns in one go. Which rows of shared memory belong to a fragment is a matter of where they were put.
"""

from __future__ import annotations

import math
from typing import Any

from moegen.cuda_geometry import Product
from moegen.errors import ScheduleError

from .rewrites import LeaveEarly, Multiply, Rewrite, ScatterRows, Swizzle
from .tiling import Tile

COPY_BYTES = 16
FUNCTIONS = {
    ("bfloat16", False): "moegen_mma_bf16",
    ("float16", False): "moegen_mma_f16",
    ("float32", True): "moegen_mma_tf32",
    ("float32", False): "moegen_fma_f32",
}


def apply(sch: Any, name: str, product: Product, tile: Tile, item_bytes: int, tf32: bool = False) -> list[Rewrite]:
    """Thread blocks own tiles, warps own parts of a tile; the pipeline fills one stage of shared memory while others are used."""
    output, total = sch.get_sblock("output", name), sch.get_sblock("total", name)
    block, m, n = sch.get_loops(output)
    row_warp, row_lane, rows = sch.split(m, [tile.row_warps, 8, tile.thread_rows])
    tile_at, column_warp, column_lane, columns = sch.split(n, [None, tile.column_warps, 4, tile.thread_columns])
    sch.reorder(block, tile_at, row_warp, column_warp, row_lane, column_lane, rows, columns)
    warp, lane = sch.fuse(row_warp, column_warp), sch.fuse(row_lane, column_lane)
    sch.bind(block, "blockIdx.x")
    sch.bind(tile_at, "blockIdx.y")
    sch.bind(warp, "threadIdx.y")
    sch.bind(lane, "threadIdx.x")
    stored = 2 if str(sch.get(output).writes[0].source.dtype) in ("bfloat16", "float16") else 4
    together = math.gcd(tile.thread_columns, COPY_BYTES // stored)
    value = sch.get_sblock("value", name)
    sch.set_scope(value, 0, "local")
    sch.compute_at(value, lane, preserve_unit_loops=True)
    for loop in sch.get_loops(value)[4:]:
        sch.unroll(loop)
    sch.set_scope(total, 0, "local")
    sch.compute_at(total, lane, preserve_unit_loops=True)
    sums = sch.get_loops(total)[4:]
    step, term = sch.split(sums[-1], [None, tile.terms])
    sch.reorder(step, *sums[:-1], term)
    for source, permuted in (("rows", _rows_of_fragments(tile)), ("columns", _columns_of_fragments(tile))):
        copy = sch.get_sblock(source, name)
        sch.transform_layout(copy, ("write", 0), permuted)
        sch.transform_block_layout(copy, permuted)
        _copy(sch, copy, step, tile, COPY_BYTES // item_bytes)
    start = sch.decompose_reduction(total, step)
    for loop in sch.get_loops(start)[4:]:
        sch.unroll(loop)
    sch.unroll(rows)
    if together > 1:
        several, inner = sch.split(columns, [None, together])
        sch.unroll(several)
        sch.vectorize(inner)
    else:
        sch.unroll(columns)
    if tile.stages > 1:
        sch.annotate(step, "software_pipeline_stage", [0, 0, tile.stages - 1])
        sch.annotate(step, "software_pipeline_order", [0, 1, 2])
        sch.annotate(step, "software_pipeline_async_stages", [0])
    outer = sch.blockize(sums[1])
    wishes: list[Rewrite] = [Multiply(str(sch.get(outer).name_hint), _function(product, tile, tf32), tile.column_warps)]
    wishes += [Swizzle(copy, tile.terms, COPY_BYTES // item_bytes) for copy in ("rows", "columns")]
    parameters = {p.name for p in sch.mod[name].params}
    if "slot" in parameters:
        wishes.append(ScatterRows())
    if "expert" in parameters:
        wishes.append(LeaveEarly(sch.get(block).loop_var))
    return wishes


def _function(product: Product, tile: Tile, tf32: bool) -> str:
    """The device function with its sizes: a warp's fragments of 16 rows and of 8 columns, parts, warps across, terms."""
    function = FUNCTIONS.get((product.dtype, tf32))
    if function is None:
        raise ScheduleError(f"tf32 is for float32 layers, not {product.dtype}")
    sizes = (tile.thread_rows // 2, tile.thread_columns // 2, product.parts, tile.column_warps, tile.terms)
    return f"{function}<{', '.join(map(str, sizes))}>"


def _copy(sch: Any, block: Any, step: Any, tile: Tile, together: int) -> None:
    """Neighbouring threads copy neighbouring 16 bytes."""
    sch.set_scope(block, 0, "shared.dyn")
    sch.compute_at(block, step, preserve_unit_loops=True)
    *outer, terms = sch.get_loops(block)[5:]
    chunks, vector = sch.split(terms, [None, together])
    _, warp, lane = sch.split(sch.fuse(*outer, chunks), [None, tile.warps, 32])
    sch.bind(warp, "threadIdx.y")
    sch.bind(lane, "threadIdx.x")
    sch.vectorize(vector)


def _rows_of_fragments(tile: Tile) -> Any:
    """The 8 rows that one `ldmatrix` reads for a fragment belong to 8 threads: they lie one after another."""
    own = tile.thread_rows
    return lambda b, m, k: (b, m // (8 * own), m % own, m // own % 8, k)


def _columns_of_fragments(tile: Tile) -> Any:
    """The 8 columns of a fragment: pairs of 4 threads."""
    own = tile.thread_columns
    return lambda b, c, n, k: (b, c, n // (4 * own), n % own // 2, n // own % 4, n % 2, k)
