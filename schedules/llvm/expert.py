"""Grouped expert products (up with its activation, down): threads own panels, so any routing is balanced."""

from __future__ import annotations

from typing import Any

from moegen.geometry import ALIGNMENT_BYTES, ITEM_BYTES, Geometry, Product

from ..rewrites import Prefetch, Rewrite, ScatterAdd
from . import machine
from .product import Knobs, check, default, finish_tile, tile

__all__ = ["Knobs", "apply", "check", "default"]


def apply(sch: Any, name: str, geometry: Geometry, knobs: Knobs) -> list[Rewrite]:
    """Panels in parallel; for each block of a panel all row blocks, which meanwhile ask memory for the next block."""
    stage = name.rpartition("_")[0]
    product: Product = getattr(geometry, stage.removeprefix("expert_"))
    block, panel, *inner = sch.get_loops(sch.get_sblock("output", name))
    sch.reorder(panel, block, *inner)
    sch.parallel(panel)
    finish_tile(sch, inner)
    if product.pair > 1 and stage.endswith("up"):
        activated = sch.get_sblock("activated", name)
        sch.set_scope(activated, 0, "local")
        sch.compute_at(activated, inner[0], preserve_unit_loops=True)
        finish_tile(sch, sch.get_loops(activated)[-len(inner) :])
    nest = tile(sch, name, product, panel, knobs)
    sch.annotate(nest.q, "pragma_import_llvm", machine.PREFETCH_IR)
    dtype = geometry.config.dtype
    rewrites: list[Rewrite] = [
        Prefetch(
            *(sch.get(loop).loop_var for loop in (panel, nest.q, nest.block, nest.chunk)),
            parts_per_panel=product.k_blocks,
            chunks_per_part=product.chunks_per_part,
            lines_per_chunk=product.lines_per_chunk(dtype),
            function=machine.PREFETCH_FUNCTION,
            line_items=ALIGNMENT_BYTES // ITEM_BYTES[dtype],
        )
    ]
    if stage.endswith("down"):
        rewrites.append(ScatterAdd(product.columns))
    return rewrites
