"""Scores, selection and weights: a thread block for each token, a thread for each expert or several."""

from __future__ import annotations

from typing import Any

from .rewrites import Rewrite

MOST_THREADS = 256


def apply(sch: Any, name: str, experts: int, threads: int | None = None) -> list[Rewrite]:
    """Every stage of a token in shared memory, its experts side by side; what is one number for all is reduced across threads."""
    threads = threads or min(MOST_THREADS, max(32, 1 << (experts - 1).bit_length()))
    blocks = {sch.get(b).name_hint: b for b in sch.get_child_blocks(sch.get_sblock("root", name))}
    outputs = [stage for stage in blocks if stage.startswith("output")]
    token, choice = sch.get_loops(blocks[min(outputs)])
    sch.bind(token, "blockIdx.x")
    _spread(sch, choice, threads)
    for stage in reversed([stage for stage in blocks if stage not in outputs]):
        _place(sch, blocks[stage], token, threads)
    return []


def _place(sch: Any, block: Any, token: Any, threads: int) -> None:
    """What a block makes of one token: by many threads in shared memory, or a single value by each for itself."""
    sch.compute_at(block, token, preserve_unit_loops=True)
    spatial, summed = _loops(sch, block)
    for written in range(len(sch.get(block).writes)):
        sch.set_scope(block, written, "shared" if spatial or summed else "local")
    if spatial and summed and len(sch.get(block).writes) == 1:
        _sums(sch, block, threads)
    elif spatial or summed:
        _spread(sch, (spatial or summed)[0], threads)


def _sums(sch: Any, block: Any, threads: int) -> None:
    """One sum for each of many: a thread makes it in a register and stores it."""
    stored = sch.cache_write(block, 0, "local")
    _spread(sch, _loops(sch, stored)[0][0], threads)
    sch.compute_at(block, sch.get_loops(stored)[-1], preserve_unit_loops=True)
    sch.decompose_reduction(block, sch.get_loops(block)[-1])


def _loops(sch: Any, block: Any) -> tuple[list[Any], list[Any]]:
    """The loops of a block within its token's that are not reduced, and those that are, without such of one iteration."""
    loops = list(zip(sch.get_loops(block)[1:], sch.get(block).iter_vars, strict=True))
    spatial = [loop for loop, var in loops[1:] if int(var.iter_type) == 0 and int(sch.get(loop).extent) > 1]
    return spatial, [loop for loop, var in loops if int(var.iter_type) != 0 and int(sch.get(loop).extent) > 1]


def _spread(sch: Any, loop: Any, threads: int) -> None:
    """Neighbouring iterations on neighbouring threads; of a single one, all do the same."""
    if int(sch.get(loop).extent) == 1:
        return
    _, thread = sch.split(loop, [None, threads])
    sch.bind(thread, "threadIdx.x")
