"""Router logits: the host gives row blocks to threads, because there are few panels and often many tokens."""

from __future__ import annotations

from typing import Any

from moegen.geometry import Geometry

from ..rewrites import Rewrite
from .product import Knobs, check, default, finish_tile, tile

__all__ = ["Knobs", "apply", "check", "default"]


def apply(sch: Any, name: str, geometry: Geometry, knobs: Knobs) -> list[Rewrite]:
    """Panel after panel of a row block."""
    block, rows, panel, *inner = sch.get_loops(sch.get_sblock("output", name))
    sch.reorder(block, panel, rows, *inner)
    finish_tile(sch, [rows, *inner])
    sch.set_scope(sch.get_sblock("total", name), 0, "local")
    tile(sch, name, geometry.router, panel, knobs)
    return []
