"""Grouped expert products (up with its activation, down): threads own panels, so any routing is balanced."""

from __future__ import annotations

from typing import Any

from moegen.geometry import ALIGNMENT_BYTES, ITEM_BYTES, Geometry, Product

from ..rewrites import Prefetch, Rewrite, ScatterAdd, StoreFrom
from . import machine
from .product import Knobs, check, default, finish_tile, tile

__all__ = ["Knobs", "apply", "check", "default"]


# How far ahead memory is asked: as long as an answer takes. Tiles of few rows go through lines faster, but the hardware helps them.
LEAD_LINES = 128
FEW_ROWS, LEAD_LINES_FEW_ROWS = 3, 64
BURST_LINES = 16  # asked for at once: a core waits for the first of more before it goes on


def apply(sch: Any, name: str, geometry: Geometry, knobs: Knobs) -> list[Rewrite]:
    """For each block of a panel all row blocks, which meanwhile ask memory for the next; the host gives panels to threads."""
    stage = name.rpartition("_")[0]
    product: Product = getattr(geometry, stage.removeprefix("expert_"))
    block, panel, *inner = sch.get_loops(sch.get_sblock("output", name))
    sch.reorder(panel, block, *inner)
    finish_tile(sch, inner)
    if product.row_dtype == "bfloat16" and stage.endswith("up"):
        activated = sch.get_sblock("activated", name)
        sch.set_scope(activated, 0, "local")
        sch.compute_at(activated, inner[0], preserve_unit_loops=True)
        finish_tile(sch, sch.get_loops(activated)[-len(inner) :])
    stores: Rewrite = ScatterAdd(product.columns) if stage.endswith("down") else StoreFrom(product.panels)
    rows, lines = int(name.rpartition("_")[2]), product.lines_per_chunk
    bursts = max(1, lines // BURST_LINES)
    nest = tile(sch, name, product, panel, knobs, bursts)
    if lines == 0:
        return [stores]
    sch.annotate(nest.q, "pragma_import_llvm", machine.PREFETCH_IR)
    prefetch = Prefetch(
        *(sch.get(loop) for loop in (panel, nest.q, nest.block, nest.chunk)),
        lines_per_chunk=lines // bursts,
        lead_lines=LEAD_LINES if rows > FEW_ROWS else LEAD_LINES_FEW_ROWS,
        line_items=ALIGNMENT_BYTES // ITEM_BYTES[product.word_dtype],
        function=machine.PREFETCH_FUNCTION,
    )
    return [prefetch, stores]
