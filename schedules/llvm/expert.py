"""Grouped expert products (up with its activation, down): threads own panels, so any routing is balanced."""

from __future__ import annotations

import dataclasses
from typing import Any

from moegen.errors import ScheduleError
from moegen.geometry import ALIGNMENT_BYTES, ITEM_BYTES, Geometry, Product
from moegen.target import Target

from ..rewrites import Prefetch, Rewrite, ScatterAdd, StoreFrom
from . import machine, product
from .product import finish_tile, tile

__all__ = ["FEW_ROWS", "Knobs", "Streaming", "apply", "check", "default", "part_of", "space"]

FEW_ROWS = 3  # tiles of so many rows wait for memory; larger ones have work to do meanwhile
MOST_LINES = 1024
# Zen 3 reads a stream of float32 weights 8 to 25 % faster where it is not asked ahead: requests hide the stream from the hardware.
OWN_STREAMS = {"znver3": "float32"}


@dataclasses.dataclass(frozen=True)
class Streaming:
    """How a tile kernel takes its weights from memory.

    Args:
        k_unroll: how many steps along the dot product are unrolled.
        lead_lines: how many cache lines ahead memory is asked: as long as an answer takes; 0 where a single row block leaves that
            to the hardware.
        burst_lines: most cache lines asked for at once: a core waits for the first of more before it goes on.
    """

    k_unroll: int = 1
    lead_lines: int = 128
    burst_lines: int = 16


@dataclasses.dataclass(frozen=True)
class Knobs:
    """Choices of one product of the experts.

    Args:
        few: of the tile kernels of at most `FEW_ROWS` rows. They go through lines faster, but the hardware helps them.
        others: of the other tile kernels.
    """

    few: Streaming = Streaming(lead_lines=64)
    others: Streaming = Streaming()


def default(geometry: Geometry, target: Target) -> Knobs:
    """One choice for all layers, but for processors that find streams of few rows by themselves."""
    if OWN_STREAMS.get(target.mcpu) == geometry.up.weight_dtype:
        return Knobs(few=Streaming(lead_lines=0))
    return Knobs()


def check(geometry: Geometry, target: Target, knobs: Knobs) -> None:
    """Legality.

    Raises:
        ScheduleError: a number is out of range, or steps cannot be divided into bursts and unrolled steps.
    """
    for part, chosen in (("few", knobs.few), ("others", knobs.others)):
        product.check(geometry, target, product.Knobs(chosen.k_unroll))
        for name, least in (("lead_lines", 0), ("burst_lines", 1)):
            if not least <= getattr(chosen, name) <= MOST_LINES:
                raise ScheduleError(f"{part}.{name}={getattr(chosen, name)} must be between {least} and {MOST_LINES}")
        for each in (geometry.up, geometry.down):
            bursts, steps = _bursts(each, chosen), each.steps_per_chunk
            if steps % (bursts * chosen.k_unroll):
                raise ScheduleError(
                    f"{part}.k_unroll={chosen.k_unroll} must divide the {steps / bursts:g} steps of a burst that "
                    f"{part}.burst_lines={chosen.burst_lines} makes"
                )


def space(geometry: Geometry, target: Target) -> dict[str, tuple[int, ...]]:
    """The values worth trying for each field of `Streaming`; not all of their combinations are legal."""
    lines = max(each.lines_per_chunk for each in (geometry.up, geometry.down))
    bursts = tuple(burst for burst in (8, 16, 32) if burst <= lines) if lines >= 16 else (16,)
    return {"k_unroll": (1, 2), "lead_lines": (0, 16, 32, 64, 128, 192), "burst_lines": bursts}


def part_of(function: str) -> str:
    """Which of the `Knobs` a tile kernel has: the name of a field."""
    return "few" if _rows(function) <= FEW_ROWS else "others"


def _rows(function: str) -> int:
    return int(function.rpartition("_")[2])


def _bursts(each: Product, chosen: Streaming) -> int:
    """Into how many bursts the lines of a chunk are divided."""
    return max(1, each.lines_per_chunk // chosen.burst_lines)


def apply(sch: Any, name: str, geometry: Geometry, knobs: Knobs) -> list[Rewrite]:
    """For each block of a panel all row blocks, which meanwhile ask memory for the next; the host gives panels to threads."""
    stage = name.rpartition("_")[0]
    own: Product = getattr(geometry, stage.removeprefix("expert_"))
    chosen: Streaming = getattr(knobs, part_of(name))
    block, panel, *inner = sch.get_loops(sch.get_sblock("output", name))
    sch.reorder(panel, block, *inner)
    finish_tile(sch, inner)
    if own.row_dtype == "bfloat16" and stage.endswith("up"):
        activated = sch.get_sblock("activated", name)
        sch.set_scope(activated, 0, "local")
        sch.compute_at(activated, inner[0], preserve_unit_loops=True)
        finish_tile(sch, sch.get_loops(activated)[-len(inner) :])
    stores: Rewrite = ScatterAdd(own.columns) if stage.endswith("down") else StoreFrom(own.panels)
    bursts = _bursts(own, chosen)
    # Few rows are one row block: LLVM would decode a short group once for all blocks and keep it on the stack.
    own_block = block if own.group and _rows(name) <= FEW_ROWS else None
    nest = tile(sch, name, own, panel, product.Knobs(chosen.k_unroll), bursts, own_block)
    if own.lines_per_chunk == 0:
        return [stores]
    sch.annotate(nest.q, "pragma_import_llvm", machine.PREFETCH_IR)
    prefetch = Prefetch(
        *(sch.get(loop) for loop in (panel, nest.q, nest.block, nest.chunk)),
        lines_per_chunk=own.lines_per_chunk // bursts,
        lead_lines=chosen.lead_lines,
        line_items=ALIGNMENT_BYTES // ITEM_BYTES[own.word_dtype],
        function=machine.PREFETCH_FUNCTION,
    )
    return [prefetch, stores]
