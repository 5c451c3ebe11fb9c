"""The router for a few tokens, and the choice of experts after it in the same launch, a thread block for each token.

Both are scheduled with the same threads, and `moegen.cuda.joining` makes one kernel of them. A router that is too large for that is
a launch of its own, of many thread blocks.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from moegen.cuda_geometry import COPY_BYTES, ROUTER_LANES, CudaGeometry
from moegen.errors import ScheduleError

from . import few
from .rewrites import Rewrite

MOST_THREADS = 512  # by default: twice as many have half the registers for loads under way, and barriers take longer
MOST_LOADS = 4096  # of 16 bytes: what a multiprocessor has to wait for at once to read as fast as it can
WAIT_BYTES = 80 << 10  # what could have been read while a thread block waits for the first of its columns
MOST_TOKENS = 128  # about as many as a device has multiprocessors; for more, a tile of tokens reads the router once
MOST_BYTES = 256 << 10  # of the router


@dataclasses.dataclass(frozen=True)
class Knobs:
    """Choices of the router's product.

    Args:
        columns: logits that a thread block makes at the same time; one that owns a token makes all in turn.
        lanes: threads that share a logit's dot product, neighbours in a warp.
        unroll: steps of the dot product whose loads are under way together.
    """

    columns: int
    lanes: int
    unroll: int


def default(geometry: CudaGeometry) -> Knobs:
    """As many threads as have something to read, up to `MOST_THREADS`, and `MOST_LOADS` under way; columns of padding cost, too."""
    router = geometry.router
    row_bytes = router.k_padded * geometry.item_bytes
    columns = min((64, 32, 16, 8), key=lambda one: -(-router.n // one) * (one * row_bytes + WAIT_BYTES))
    lanes = min(_most_lanes(geometry), MOST_THREADS // columns)
    return Knobs(columns, lanes, min(16, MOST_LOADS // (columns * lanes)))


def default_alone(geometry: CudaGeometry) -> Knobs:
    """Of the router's own launch: as many thread blocks as there can be."""
    return Knobs(4, _most_lanes(geometry), 8)


def default_tokens(geometry: CudaGeometry) -> int:
    """Up to how many tokens one launch is taken, 0 for never.

    A multiprocessor reads some 100 GB/s. A router of `MOST_BYTES` takes it about as long as a second launch takes; a larger one is
    better read by many thread blocks, which do not know of one another's logits.
    """
    router = geometry.router
    return MOST_TOKENS if router.n * router.k_padded * geometry.item_bytes <= MOST_BYTES else 0


def check(knobs: Knobs, geometry: CudaGeometry) -> None:
    """Legality.

    Raises:
        ScheduleError: a number is out of range.
    """
    if knobs.columns not in (4, 8, 16, 32, 64):
        raise ScheduleError(f"columns={knobs.columns} must be 4, 8, 16, 32 or 64")
    if knobs.unroll not in (1, 2, 4, 8, 16):
        raise ScheduleError(f"unroll={knobs.unroll} must be 1, 2, 4, 8 or 16")
    most = _most_lanes(geometry)
    if knobs.lanes < 1 or most % knobs.lanes:
        raise ScheduleError(f"lanes={knobs.lanes} must be a power of two up to {most}")
    if not 32 <= knobs.columns * knobs.lanes <= 1024:
        raise ScheduleError(f"columns * lanes = {knobs.columns * knobs.lanes} threads must be between 32 and 1024")


def space(geometry: CudaGeometry) -> tuple[Knobs, ...]:
    """Everything legal that is worth trying."""
    found = []
    for knobs in (Knobs(c, lanes, u) for c in (4, 8, 16, 32, 64) for lanes in (4, 8, 16, 32) for u in (2, 4, 8, 16)):
        try:
            check(knobs, geometry)
        except ScheduleError:
            continue
        found.append(knobs)
    return tuple(found)


def apply(sch: Any, name: str, knobs: Knobs, geometry: CudaGeometry) -> list[Rewrite]:
    """The logits; within one launch, `topk.apply` with as many threads is the other half."""
    check(knobs, geometry)
    return few.dot_products(sch, name, knobs.columns, knobs.lanes, knobs.unroll, geometry.item_bytes, geometry.token_copy)


def _most_lanes(geometry: CudaGeometry) -> int:
    return min(ROUTER_LANES, geometry.router_terms * geometry.item_bytes // COPY_BYTES)
