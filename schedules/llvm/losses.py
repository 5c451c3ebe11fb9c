"""Router losses: token statistics in parallel over tokens, sums over tokens in token order (bitwise repeatable)."""

from __future__ import annotations

from typing import Any

from moegen.geometry import Geometry

from ..rewrites import Rewrite
from ._fixed import Knobs, check, default

__all__ = ["Knobs", "apply", "check", "default"]

PER_TOKEN = ("peak", "power", "mass", "share", "whole", "log_mass")


def apply(sch: Any, name: str, geometry: Geometry, knobs: Knobs) -> list[Rewrite]:
    """Tokens in parallel where stages allow it; one thread per group of experts for the mean probabilities."""
    blocks = {sch.get(b).name_hint: b for b in sch.get_child_blocks(sch.get_sblock("root", name))}
    for stage in PER_TOKEN:
        if stage in blocks:
            sch.parallel(sch.get_loops(blocks[stage])[0])
    expert, token = sch.get_loops(blocks["probability"])
    sch.parallel(expert)
    sch.decompose_reduction(blocks["probability"], token)
    return []
