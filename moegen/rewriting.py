"""Carrying out on scheduled TIR what schedules ask for and schedule primitives cannot express."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import tvm_ffi
from tvm import tirx
from tvm.ir import Range
from tvm.s_tir import SBlock

from .schedules.rewrites import Prefetch, Rewrite, ScatterAdd


def rewrite(function: Any, wishes: Iterable[Rewrite]) -> Any:
    """`function` with each of `wishes` carried out in turn."""
    for wish in wishes:
        function = _prefetch(function, wish) if isinstance(wish, Prefetch) else _scatter_add(function, wish)
    return function


def _prefetch(function: Any, wish: Prefetch) -> Any:
    """`ahead[b]` is (first line relative to the running part, lines for each chunk), counted in cache lines of `w`."""
    w, ahead = _parameter(function, "w"), _parameter(function, "ahead")
    zeros = [_i64(0)] * (len(w.shape) - 1)

    def ask(loop: Any) -> Any:
        if not loop.loop_var.same_as(wish.chunk):
            return loop
        running = (wish.panel * wish.parts_per_panel + wish.q) * (wish.chunks_per_part * wish.lines_per_chunk)
        step, line = ahead[wish.block, _i64(1)], tirx.Var("line", "int64")
        at = running + ahead[wish.block, _i64(0)] + loop.loop_var * step + line
        request = tirx.call_extern("void", wish.function, tirx.address_of(w[tuple([*zeros, at * wish.line_items])]))
        requests = tirx.For(line, _i64(0), step, tirx.ForKind.SERIAL, tirx.Evaluate(request))
        return _with_body(loop, tirx.SeqStmt([requests, loop.body]))

    return function.with_body(tvm_ffi.structural_map(function.body, (tirx.For, ask)))


def _scatter_add(function: Any, wish: ScatterAdd) -> Any:
    """The last parameter, `output`, becomes the sums `y` [panels, T, columns]."""
    output, token = function.params[-1], _parameter(function, "token")
    panels, columns = output.shape[1], _i64(wish.columns)
    y = tirx.decl_buffer((panels, tirx.Var("T", "int64"), columns), "float32", "y")

    def add(store: Any) -> Any:
        if not store.buffer.same_as(output):
            return store
        b, panel, m, *within = store.indices
        at = [panel, token[b, m].astype("int64"), _flat(within, output.shape[3:])]
        return tirx.IfThenElse(token[b, m] >= 0, tirx.BufferStore(y, y[tuple(at)] + store.value, at), None)

    everywhere = tirx.BufferRegion(y, [Range(_i64(0), extent) for extent in y.shape])

    def declare(block: Any) -> Any:
        writes = [everywhere if region.source.same_as(output) else region for region in block.writes]
        if all(new is old for new, old in zip(writes, block.writes, strict=True)):
            return block
        fields = (block.init, block.alloc_buffers, block.match_buffers, block.annotations)
        return SBlock(block.iter_vars, [*block.reads, everywhere], writes, block.name_hint, block.body, *fields)

    body = tvm_ffi.structural_map(function.body, [(tirx.BufferStore, add), (SBlock, declare)])
    return tirx.PrimFunc([*function.params[:-1], y], body, function.ret_type, function.attrs)


def _flat(indices: list[Any], extents: Any) -> Any:
    flat = _i64(0)
    for index, extent in zip(indices, extents, strict=True):
        flat = flat * extent + index
    return flat


def _parameter(function: Any, name: str) -> Any:
    return next(parameter for parameter in function.params if parameter.name == name)


def _with_body(loop: Any, body: Any) -> Any:
    return tirx.For(loop.loop_var, loop.min, loop.extent, loop.kind, body, loop.thread_binding, loop.annotations)


def _i64(value: int) -> Any:
    return tirx.const(value, "int64")


__all__ = ["rewrite"]
