"""Schedules for CPUs through LLVM."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from . import dispatch, expert, finish, gather, losses, router, rows, tiling, topk

__all__ = ["STAGES", "expert", "knobs_of", "object_of", "stage_of", "tiling"]

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


def object_of(function: str) -> str:
    """The object file that a function goes into: tile kernels whose knobs are chosen apart are compiled apart."""
    stage = stage_of(function)
    return f"{stage}_{expert.part_of(function)}" if STAGES.get(stage) is expert else "rest"


def knobs_of(function: str, knobs: Mapping[str, Any]) -> Any:
    """The knobs that decide one function, out of those of all stages."""
    stage = stage_of(function)
    return getattr(knobs[stage], expert.part_of(function)) if STAGES.get(stage) is expert else knobs.get(stage)
