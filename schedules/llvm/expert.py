"""Grouped expert products (up with its activation, down): threads own panels, so any routing is balanced."""

from __future__ import annotations

from typing import Any

from .product import Knobs, check, default, finish_tile, tile

__all__ = ["Knobs", "apply", "check", "default"]


def apply(sch: Any, name: str, knobs: Knobs) -> None:
    """Panels in parallel; for each panel all row blocks, so that the panel is read from cache after the first."""
    block, panel, *inner = sch.get_loops(sch.get_sblock("output", name))
    sch.reorder(panel, block, *inner)
    sch.parallel(panel)
    finish_tile(sch, inner)
    tile(sch, name, block, knobs)
