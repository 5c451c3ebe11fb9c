"""Router losses: statistics of tokens side by side, sums over tokens in token order (bitwise repeatable).

TVM makes a kernel of each stage; they are wanted rarely and need not be fast.
"""

from __future__ import annotations

from typing import Any

from .rewrites import Rewrite

THREADS = 128


def apply(sch: Any, name: str) -> list[Rewrite]:
    """A thread for each token, expert or number."""
    for block in sch.get_child_blocks(sch.get_sblock("root", name)):
        spatial = [
            loop for loop, var in zip(sch.get_loops(block), sch.get(block).iter_vars, strict=True) if int(var.iter_type) == 0
        ]
        tile, thread = sch.split(sch.fuse(*spatial) if len(spatial) > 1 else spatial[0], [None, THREADS])
        sch.bind(tile, "blockIdx.x")
        sch.bind(thread, "threadIdx.x")
    return []
