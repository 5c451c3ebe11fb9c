"""Scores, selection and weights of one token at a time: everything between logits and ids stays in the first-level cache."""

from __future__ import annotations

from typing import Any

from moegen.geometry import Geometry

from ..rewrites import Rewrite
from ._fixed import Knobs, check, default

__all__ = ["Knobs", "apply", "check", "default"]

ROW_STAGES = ("power", "score_of", "choice", "open")


def apply(sch: Any, name: str, geometry: Geometry, knobs: Knobs) -> list[Rewrite]:
    """Tokens in parallel; every other stage moves under the token's loop, last producers first."""
    blocks = {sch.get(b).name_hint: b for b in sch.get_child_blocks(sch.get_sblock("root", name))}
    outputs = {stage for stage in blocks if stage.startswith("output")}
    token, _ = sch.get_loops(blocks[min(outputs)])
    sch.parallel(token)
    for stage in reversed([stage for stage in blocks if stage not in outputs]):
        sch.compute_at(blocks[stage], token, preserve_unit_loops=True)
    for stage, block in blocks.items():
        if stage.startswith(ROW_STAGES):
            _vectorize_row(sch, sch.get_loops(block)[-1])
        elif stage == "place":
            _rank_row(sch, block)
        elif stage.startswith("lanes"):
            lane, group = sch.get_loops(block)[-2:]
            sch.reorder(group, lane)
            sch.vectorize(lane)
            sch.decompose_reduction(block, group)
    return []


def _rank_row(sch: Any, block: Any) -> None:
    """Counts for as many experts as a vector has lanes at once, when their number allows it without a tail."""
    expert, other = sch.get_loops(block)[-2:]
    if int(sch.get(expert).extent) % 16 == 0:
        outer, inner = sch.split(expert, [None, 16])
        sch.reorder(outer, other, inner)
        sch.vectorize(inner)
        sch.decompose_reduction(block, other)


def _vectorize_row(sch: Any, experts: Any) -> None:
    """Vectorises a loop over experts, when their number allows it without a tail."""
    extent = int(sch.get(experts).extent)
    lanes = next((n for n in (16, 8, 4) if extent % n == 0), 1)
    if lanes > 1:
        _, inner = sch.split(experts, [None, lanes])
        sch.vectorize(inner)
