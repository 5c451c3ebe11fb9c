"""The register-tiled product: the sums of one row tile and panel stay in vector registers over a block of the dot product."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from moegen.errors import ScheduleError
from moegen.geometry import BYTES, VECTORS, Geometry, Product
from moegen.target import Target

from . import machine

FEW_SUMS = 8  # two pipes finish a vdpbf16ps after six cycles: so few sums keep them waiting


@dataclasses.dataclass(frozen=True)
class Knobs:
    """Choices of one product.

    Args:
        k_unroll: how many steps along the dot product are unrolled.
    """

    k_unroll: int = 1


class Nest(NamedTuple):
    """Loops of a scheduled product: blocks of the dot product, row blocks, chunks of a block (or parts of them)."""

    q: Any
    block: Any
    chunk: Any


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


def tile(sch: Any, name: str, product: Product, outer: Any, knobs: Knobs, chunk_parts: int = 1, own_block: Any = None) -> Nest:
    """Schedules `partial` and `total` of function `name` under loop `outer`: blocks of the dot product, row blocks, the tile.

    A block of weights is so used by all row blocks while it is in the cache; the sums wait in a buffer meanwhile.

    Args:
        chunk_parts: into how many iterations of the nest's last loop a chunk is divided.
        own_block: the loop over row blocks under `outer`, where each goes through the whole dot product with its sums in registers.
    """
    partial, total = sch.get_sblock("partial", name), sch.get_sblock("total", name)
    sch.compute_at(total, outer if own_block is None else own_block, preserve_unit_loops=True)
    block, panel, rows, vectors, lanes, q = sch.get_loops(total)[-6:]
    sch.reorder(q, block, panel, rows, vectors, lanes)
    if own_block is not None:
        sch.set_scope(total, 0, "local")
    sch.compute_at(partial, block, preserve_unit_loops=True)
    chunk = _tile(sch, partial, product, knobs, chunk_parts)
    for loop in (rows, vectors):
        sch.unroll(loop)
    sch.vectorize(lanes)
    sch.decompose_reduction(total, q)
    return Nest(q, block if own_block is None else own_block, chunk)


def _tile(sch: Any, partial: Any, product: Product, knobs: Knobs, chunk_parts: int) -> Any:
    """Rows and vectors unrolled, sums in registers; returns the loop over chunks of the dot product, or parts of them."""
    sch.set_scope(partial, 0, "local")
    words = product.bits == 4 and product.pair == 2  # a vector of weights holds four pairs of terms
    count = 5 + int(product.pair > 1) + int(words)
    rows, vectors, lanes, chunk, step, *terms = sch.get_loops(partial)[-count:]
    inner = [*terms[:1], lanes, *terms[1:]] if words else [lanes, *terms]
    sch.reorder(chunk, step, rows, vectors, *inner)
    if chunk_parts > 1:
        part, step = sch.split(step, [chunk_parts, None])
        chunk = sch.fuse(chunk, part)
    if knobs.k_unroll > 1:
        _, unrolled = sch.split(step, [None, knobs.k_unroll])
        sch.unroll(unrolled)
    for loop in (rows, vectors):
        sch.unroll(loop)
    dot = _dot(product)
    if words and VECTORS * int(sch.get(rows).extent) <= FEW_SUMS:
        dot = f"{dot}{machine.APART}"
    if dot is None:
        for loop in inner[1:]:
            sch.unroll(loop)
        sch.vectorize(lanes)
        sch.decompose_reduction(partial, chunk)
        return chunk
    sch.vectorize(sch.get_loops(sch.decompose_reduction(partial, chunk))[-1])
    sch.tensorize(inner[0], machine.DOTS[dot])
    sch.annotate(chunk, "pragma_import_llvm", machine.DOT_IR[dot])
    return chunk


def _dot(product: Product) -> str | None:
    """What the instruction takes that multiplies several terms at once; None where there is none."""
    if product.pair == 1 or (product.pair == BYTES and not product.byte_dot):
        return None
    return "bytes" if product.pair == BYTES else product.weight_dtype


def finish_tile(sch: Any, loops: list[Any]) -> None:
    """The epilogue's own loops (rows, [vectors,] lanes): rows stay a loop, which reads the sums back from the cache.

    Unrolling them too would multiply the code by the rows.
    """
    for loop in loops[1:-1]:
        sch.unroll(loop)
    sch.vectorize(loops[-1])
