"""What a schedule asks for that schedule primitives cannot express; `moegen.rewriting` carries it out."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Prefetch:
    """Requests to memory for the weights that are wanted next, a few cache lines in each iteration of `chunk`.

    Args:
        panel, q, block, chunk: loop variables of the product's nest.
        parts_per_panel, chunks_per_part, lines_per_chunk: sizes of the stored weights, in blocks, chunks and cache lines.
        function: name of the function that asks for the line at an address.
        line_items: elements of a cache line.
    """

    panel: Any
    q: Any
    block: Any
    chunk: Any
    parts_per_panel: int
    chunks_per_part: int
    lines_per_chunk: int
    function: str
    line_items: int


@dataclasses.dataclass(frozen=True)
class ScatterAdd:
    """Instead of storing to `output` [B, panels, M, ...]: y[panel, token[b, m], ...] += value, unless the token is -1.

    Args:
        columns: float32 columns of one panel.
    """

    columns: int


Rewrite = Prefetch | ScatterAdd
