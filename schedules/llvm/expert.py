"""Grouped expert products (up with its activation, down): threads own panels, so any routing is balanced."""

from __future__ import annotations

from typing import Any

from moegen.geometry import ALIGNMENT_BYTES, ITEM_BYTES, Geometry, Product

from ..rewrites import Prefetch, Rewrite, ScatterAdd, StoreFrom
from . import machine
from .product import Knobs, check, default, finish_tile, tile

__all__ = ["Knobs", "apply", "check", "default"]


LEAD_LINES = 32


def apply(sch: Any, name: str, geometry: Geometry, knobs: Knobs) -> list[Rewrite]:
    """For each block of a panel all row blocks, which meanwhile ask memory for the next; the host gives panels to threads."""
    stage = name.rpartition("_")[0]
    product: Product = getattr(geometry, stage.removeprefix("expert_"))
    block, panel, *inner = sch.get_loops(sch.get_sblock("output", name))
    sch.reorder(panel, block, *inner)
    finish_tile(sch, inner)
    if product.pair > 1 and stage.endswith("up"):
        activated = sch.get_sblock("activated", name)
        sch.set_scope(activated, 0, "local")
        sch.compute_at(activated, inner[0], preserve_unit_loops=True)
        finish_tile(sch, sch.get_loops(activated)[-len(inner) :])
    nest = tile(sch, name, product, panel, knobs)
    sch.annotate(nest.q, "pragma_import_llvm", machine.PREFETCH_IR)
    dtype = geometry.config.dtype
    prefetch = Prefetch(
        *(sch.get(loop) for loop in (panel, nest.q, nest.block, nest.chunk)),
        lines_per_chunk=product.lines_per_chunk(dtype),
        lead_lines=LEAD_LINES,
        line_items=ALIGNMENT_BYTES // ITEM_BYTES[dtype],
        function=machine.PREFETCH_FUNCTION,
    )
    return [prefetch, ScatterAdd(product.columns) if stage.endswith("down") else StoreFrom(product.panels)]
