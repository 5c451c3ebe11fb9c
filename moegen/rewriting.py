"""Carrying out on scheduled TIR what schedules ask for and schedule primitives cannot express."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import tvm_ffi
from tvm import tirx
from tvm.ir import Range
from tvm.s_tir import SBlock

from .schedules.rewrites import Prefetch, Rewrite, ScatterAdd, StoreFrom


def rewrite(function: Any, wishes: Iterable[Rewrite]) -> Any:
    """`function` with each of `wishes` carried out in turn."""
    for wish in wishes:
        match wish:
            case Prefetch():
                function = _prefetch(function, wish)
            case StoreFrom():
                function = _store_from(function, wish)
            case ScatterAdd():
                function = _scatter_add(function, wish)
    return function


def _prefetch(function: Any, wish: Prefetch) -> Any:
    w, jump = _parameter(function, "w"), _parameter(function, "jump")
    panel, q, block, chunk = wish.panel, wish.q, wish.block, wish.chunk
    part = chunk.extent * wish.lines_per_chunk
    step = tirx.truncdiv(block.extent + (wish.lines_per_chunk - 1), block.extent)
    begun = block.loop_var * step * chunk.extent
    ahead = tirx.Select(block.extent == 1, _i64(wish.lead_lines), part + begun)
    asked = tirx.And(begun < part, block.extent > 1) if wish.lead_lines == 0 else begun < part
    lines = tirx.Select(asked, step, _i64(0))
    end = panel.extent * q.extent * part
    zeros = [_i64(0)] * (len(w.shape) - 1)

    def ask(loop: Any) -> Any:
        if not loop.loop_var.same_as(chunk.loop_var):
            return loop
        at = (panel.loop_var * q.extent + q.loop_var) * part + ahead + loop.loop_var * step
        line = tirx.Var("line", "int64")
        wanted = at + tirx.Select(at >= end, jump, _i64(0)) + line
        request = tirx.call_extern("void", wish.function, tirx.address_of(w[tuple([*zeros, wanted * wish.line_items])]))
        requests = tirx.For(line, _i64(0), lines, tirx.ForKind.SERIAL, tirx.Evaluate(request))
        return tirx.For(
            loop.loop_var, loop.min, loop.extent, loop.kind, tirx.SeqStmt([requests, loop.body]), None, loop.annotations
        )

    return function.with_body(tvm_ffi.structural_map(function.body, (tirx.For, ask)))


def _store_from(function: Any, wish: StoreFrom) -> Any:
    output, first = function.params[-1], _parameter(function, "first")
    blocks, _, *within = output.shape
    whole = tirx.decl_buffer((blocks, _i64(wish.panels), *within), output.dtype, "output")

    def store(old: Any) -> Any:
        block, panel, *indices = old.indices
        return tirx.BufferStore(whole, old.value, [block, first + panel, *indices])

    return _storing_elsewhere(function, output, whole, store)


def _scatter_add(function: Any, wish: ScatterAdd) -> Any:
    output, token = function.params[-1], _parameter(function, "token")
    y = tirx.decl_buffer((output.shape[1], tirx.Var("T", "int64"), _i64(wish.columns)), "float32", "y")

    def add(old: Any) -> Any:
        b, panel, m, *within = old.indices
        at = [panel, token[b, m].astype("int64"), _flat(within, output.shape[3:])]
        return tirx.IfThenElse(token[b, m] >= 0, tirx.BufferStore(y, y[tuple(at)] + old.value, at), None)

    return _storing_elsewhere(function, output, y, add)


def _storing_elsewhere(function: Any, output: Any, other: Any, store: Callable[[Any], Any]) -> Any:
    """The last parameter, `output`, becomes `other`, and each of its stores what `store` makes of it."""
    everywhere = tirx.BufferRegion(other, [Range(_i64(0), extent) for extent in other.shape])

    def declare(block: Any) -> Any:
        writes = [everywhere if region.source.same_as(output) else region for region in block.writes]
        if all(new is old for new, old in zip(writes, block.writes, strict=True)):
            return block
        fields = (block.init, block.alloc_buffers, block.match_buffers, block.annotations)
        return SBlock(block.iter_vars, [*block.reads, everywhere], writes, block.name_hint, block.body, *fields)

    def replace(old: Any) -> Any:
        return store(old) if old.buffer.same_as(output) else old

    body = tvm_ffi.structural_map(function.body, [(tirx.BufferStore, replace), (SBlock, declare)])
    return tirx.PrimFunc([*function.params[:-1], other], body, function.ret_type, function.attrs)


def _flat(indices: list[Any], extents: Any) -> Any:
    flat = _i64(0)
    for index, extent in zip(indices, extents, strict=True):
        flat = flat * extent + index
    return flat


def _parameter(function: Any, name: str) -> Any:
    return next(parameter for parameter in function.params if parameter.name == name)


def _i64(value: int) -> Any:
    return tirx.const(value, "int64")


__all__ = ["rewrite"]
