"""Schedules for CPUs through LLVM."""

from __future__ import annotations

from types import ModuleType

from . import dispatch, expert, finish, gather, losses, router, rows, tiling, topk

__all__ = ["STAGES", "stage_of", "tiling"]

STAGES: dict[str, ModuleType] = {
    "gather": gather,
    "gather_weighted": gather,
    "quantize": rows,
    "gather_bytes": rows,
    "expert_hidden": rows,
    "shared_hidden": rows,
    "router": router,
    "topk": topk,
    "dispatch": dispatch,
    "expert_up": expert,
    "expert_down": expert,
    "shared_up": expert,
    "shared_down": expert,
    "finish": finish,
    "losses": losses,
}


def stage_of(function: str) -> str:
    """The stage that a function of the emitted module belongs to: `expert_up_14` is a tile kernel of `expert_up`."""
    stage, _, rows = function.rpartition("_")
    return stage if rows.isdigit() and stage in STAGES else function
