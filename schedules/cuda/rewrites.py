"""What a CUDA schedule asks for that schedule primitives cannot express; `moegen.cuda.rewriting` carries it out."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Multiply:
    """Instead of the loops in a block that multiply a thread's rows with its columns: one call of a device function.

    The threads of a warp do together, with the same rows and columns in shared memory and the same sums in registers, what each of
    them would do alone.

    Args:
        block: name of the block whose body is replaced.
        function: a device function of (sums of the thread, rows and columns of the thread block's stage in shared memory).
        column_warps: warps side by side, whose columns are one dimension of the columns in shared memory.
    """

    block: str
    function: str
    column_warps: int


@dataclasses.dataclass(frozen=True)
class Swizzle:
    """In a block that copies rows to shared memory, eight after one another: the places of a row's chunks are swizzled.

    A thread copies to where it would copy without it, but another chunk of the same row: a warp reads the same bytes.
    `moegen::Swizzled` in `device.cuh` says where a chunk is.

    Args:
        block: name of the copy, whose last dimension in shared memory are the terms, the ones before it the row out of eight.
        terms: of a row in one stage.
        chunk: terms in 16 bytes.
    """

    block: str
    terms: int
    chunk: int


@dataclasses.dataclass(frozen=True)
class ScatterRows:
    """Instead of storing to `output` [B, M, n]: y[slot[b, m], n] of as many rows as there are choices, unless the slot is -1."""


@dataclasses.dataclass(frozen=True)
class LeaveEarly:
    """A thread block whose row block has no expert (-1) has nothing to do.

    Args:
        loop: name of the variable of the loop over row blocks.
    """

    loop: Any


Rewrite = Multiply | Swizzle | ScatterRows | LeaveEarly
