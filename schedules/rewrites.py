"""What a schedule asks for that schedule primitives cannot express; `moegen.rewriting` carries it out."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Prefetch:
    """Requests to memory for the weights that are wanted next, a few cache lines in each iteration of `chunk`.

    Several row blocks share the work of asking for the next part (a block of the dot product of a panel), which they will all read
    from the cache; a single block reads as fast as memory gives and asks for what comes `lead_lines` later. What lies beyond the
    last panel is asked for `jump` lines further on.

    Args:
        panel, q, block, chunk: loops of the product's nest.
        lines_per_chunk: cache lines of weights of a chunk.
        lead_lines: how far ahead a single block asks; 0 where it leaves that to the hardware.
        line_items: elements of a cache line.
        function: name of the function that asks for the line at an address.
    """

    panel: Any
    q: Any
    block: Any
    chunk: Any
    lines_per_chunk: int
    lead_lines: int
    line_items: int
    function: str


@dataclasses.dataclass(frozen=True)
class StoreFrom:
    """Instead of storing to `output` [B, P, ...]: output[b, first + j, ...] of [B, panels, ...]."""

    panels: int


@dataclasses.dataclass(frozen=True)
class ScatterAdd:
    """Instead of storing to `output` [B, P, M, ...]: y[j, token[b, m], ...] += value, unless the token is -1.

    Args:
        columns: float32 columns of one panel.
    """

    columns: int


Rewrite = Prefetch | StoreFrom | ScatterAdd
