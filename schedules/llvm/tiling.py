"""The tiling that all products of a layer share; it decides the packed weight layout."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from moegen.config import MoEConfig
from moegen.errors import ScheduleError
from moegen.geometry import BYTES, VECTORS, Regime, Tiling
from moegen.target import Target

from .expert import FEW_ROWS

K_BLOCK = 512
CHUNK_ROWS = 140  # of four bytes an element: what rows and hidden values of a few thousand columns leave of a second-level cache
DOT_FEATURE = "avx512bf16"
BYTE_DOT_FEATURE = "avx512vnni"
MOST_TASKS = 64


def default(config: MoEConfig, target: Target) -> Tiling:
    """The largest register tile that leaves room for two weight vectors and one broadcast; sums of at most 512 terms.

    Of four lanes, a chunk of hidden values is so short that LLVM unrolls it whole and mixes its steps: half of the registers are
    left to that, or sums would move to the stack and back.
    """
    pair = 2 if _has_dot(config, target, target.lanes) else 1
    sums = target.registers // 2 if target.lanes == 4 else target.registers - VECTORS - 1 - _decoding(config, pair)
    max_rows = max(1, sums // VECTORS)
    terms = pair if config.activation_dtype == "same" else BYTES
    chunk_rows = CHUNK_ROWS * pair // max_rows * max_rows
    byte_dot = _has_byte_dot(config, target, target.lanes)
    return Tiling(target.lanes, max_rows, chunk_rows, K_BLOCK * terms, pair, byte_dot)


def _decoding(config: MoEConfig, pair: int) -> int:
    """Registers that turning codes into numbers takes, beside two for the numbers: LLVM's listings say so."""
    if not config.low_bit or config.activation_dtype == "int8":
        return 0
    if config.weight_dtype == "int8":
        return 3
    return 5 if config.weight_dtype == "int4" and pair == 1 else 9


def check(config: MoEConfig, target: Target, tiling: Tiling) -> None:
    """Legality.

    Raises:
        ScheduleError: the tile does not fit the registers, or a size is out of range.
    """
    if tiling.lanes not in (4, 8, 16) or tiling.lanes > target.lanes:
        raise ScheduleError(f"lanes={tiling.lanes} must be 4, 8 or 16 and at most the {target.lanes} of {target}")
    used = tiling.max_rows * VECTORS + VECTORS + 1
    if tiling.max_rows < 1 or used > target.registers:
        raise ScheduleError(f"max_rows={tiling.max_rows} needs {used} vector registers; {target} has {target.registers}")
    if tiling.chunk_rows < tiling.max_rows:
        raise ScheduleError(f"chunk_rows={tiling.chunk_rows} must be at least max_rows={tiling.max_rows}")
    if tiling.k_block < 64:
        raise ScheduleError(f"k_block={tiling.k_block} must be at least 64")
    if tiling.pair not in (1, 2) or (tiling.pair == 2 and not _has_dot(config, target, tiling.lanes)):
        raise ScheduleError(f"pair={tiling.pair} must be 1, or 2 for bfloat16 with 16 lanes on a target with {DOT_FEATURE}")
    if tiling.byte_dot and not _has_byte_dot(config, target, tiling.lanes):
        raise ScheduleError(f"byte_dot=True needs activation_dtype='int8' and 16 lanes on a target with {BYTE_DOT_FEATURE}")


def default_regimes(config: MoEConfig, target: Target, tiling: Tiling) -> tuple[Regime, ...]:
    """One table for all layers: the largest tiles, and passes as long as a batch."""
    return (Regime(None, tiling.max_rows, tiling.chunk_rows),)


def check_regimes(tiling: Tiling, regimes: Sequence[Regime]) -> None:
    """Legality of a table.

    Raises:
        ScheduleError: it is not ascending, does not end with None, or a line asks for more than the tiling has.
    """
    bounds = [regime.rows_up_to for regime in regimes]
    if not bounds or bounds[-1] is not None or None in bounds[:-1] or bounds[:-1] != sorted({b or 0 for b in bounds[:-1]}):
        raise ScheduleError(f"regimes must have ascending rows_up_to that end with None, not {bounds}")
    for regime in regimes:
        if not 1 <= regime.tile_rows <= tiling.max_rows:
            raise ScheduleError(f"tile_rows={regime.tile_rows} must be between 1 and max_rows={tiling.max_rows}")
        if not regime.tile_rows <= regime.pass_rows <= tiling.chunk_rows:
            raise ScheduleError(
                f"pass_rows={regime.pass_rows} must be between tile_rows={regime.tile_rows} and {tiling.chunk_rows}"
            )
        if not 1 <= regime.tasks_per_thread <= MOST_TASKS:
            raise ScheduleError(f"tasks_per_thread={regime.tasks_per_thread} must be between 1 and {MOST_TASKS}")


def three_regimes(tiling: Tiling, regimes: Sequence[Regime]) -> tuple[Regime, Regime, Regime]:
    """A table with a line each for experts of few rows, of one tile and of more; a single line becomes three that do the same."""
    if len(regimes) == 3:
        few, some, many = regimes
        return few, some, many
    (whole,) = regimes
    short = min(2 * tiling.max_rows, tiling.chunk_rows)  # a tile, or two of half its rows
    one_tile = dataclasses.replace(whole, pass_rows=max(whole.tile_rows, min(short, whole.pass_rows)))
    some_rows = max(tiling.max_rows, FEW_ROWS + 1)
    return dataclasses.replace(one_tile, rows_up_to=FEW_ROWS), dataclasses.replace(one_tile, rows_up_to=some_rows), whole


def space(tiling: Tiling) -> dict[str, tuple[int, ...]]:
    """The values worth trying for what the host chooses: fields of `Regime`, and `chunk_rows` of the tiling."""
    rows = tiling.max_rows
    tiles = sorted({max(1, rows - less) for less in (0, 2, 4, 6)})
    passes = [rows * times for times in (4, 6, 10, 16, 20, 28)]
    return {
        "tile_rows": tuple(tiles),
        "pass_rows": tuple(passes),
        "chunk_rows": tuple(rows * times for times in (6, 10, 14, 20, 28)),
        "tasks_per_thread": (1, 2, 4, 8),
    }


def _has_dot(config: MoEConfig, target: Target, lanes: int) -> bool:
    """Whether bfloat16 pairs can be multiplied as they are (`vdpbf16ps` on whole registers)."""
    return config.dtype == "bfloat16" and lanes == 16 and DOT_FEATURE in target.features


def _has_byte_dot(config: MoEConfig, target: Target, lanes: int) -> bool:
    """Whether rows of bytes can be multiplied as they are (`vpdpbusd` on whole registers)."""
    return config.activation_dtype == "int8" and lanes == 16 and BYTE_DOT_FEATURE in target.features
