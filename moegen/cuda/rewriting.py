"""Carrying out on scheduled TIR what CUDA schedules ask for and schedule primitives cannot express."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import tvm_ffi
from tvm import sym, tirx
from tvm.ir import Range, TensorLoad
from tvm.s_tir import MatchBufferRegion, SBlock, SBlockRealize

from ..schedules.cuda.rewrites import LeaveEarly, Multiply, Rewrite, ScatterRows, Swizzle

_EIGHT_ROWS = 8


def rewrite(function: Any, wishes: Iterable[Rewrite]) -> Any:
    """`function` with each of `wishes` carried out in turn."""
    for wish in wishes:
        match wish:
            case Multiply():
                function = _multiply(function, wish)
            case Swizzle():
                function = _swizzle(function, wish)
            case ScatterRows():
                function = _scatter_rows(function)
            case LeaveEarly():
                function = _leave_early(function, wish)
    return function


def _multiply(function: Any, wish: Multiply) -> Any:
    def visit(block: Any) -> Any:
        if block.name_hint != wish.block:
            return block
        store, first = _first_iteration(block.body)
        product = _substituted(store, first).value.b
        factors = [factor.value if isinstance(factor, tirx.Cast) else factor for factor in (product.a, product.b)]
        # Accesses say what they read and write, and of shared memory all that the threads together do: TVM places barriers and
        # shares memory by that.
        sums, rows, columns = (_region(block, buffer) for buffer in (store.buffer, *(factor.source for factor in factors)))
        warp = tirx.floordiv(columns[2].min, wish.column_warps) * wish.column_warps
        parts = [
            _matched(store.buffer, sums),
            _matched(factors[0].source, [rows[0], *_whole(factors[0].source, 1, 4), rows[4]]),
            _matched(
                factors[1].source,
                [*columns[:2], Range.from_min_extent(warp, _i64(wish.column_warps)), *_whole(factors[1].source, 3, 6), columns[6]],
            ),
        ]
        pointers = [part.buffer.access_ptr("rw" if i == 0 else "r") for i, part in enumerate(parts)]
        call = tirx.Evaluate(tirx.call_extern("void", wish.function, *pointers))
        reads = [part.source for part in parts]
        fields = (block.init, block.alloc_buffers, parts, block.annotations)
        return SBlock(block.iter_vars, reads, block.writes, block.name_hint, call, *fields)

    return function.with_body(tvm_ffi.structural_map(function.body, (SBlock, visit)))


def _region(block: Any, buffer: Any) -> list[Any]:
    return list(next(r.region for r in (*block.writes, *block.reads) if r.source.same_as(buffer)))


def _whole(buffer: Any, first: int, end: int) -> list[Any]:
    return [Range.from_min_extent(_i64(0), extent) for extent in buffer.shape[first:end]]


def _matched(buffer: Any, region: list[Any]) -> Any:
    """A part of `buffer` as a buffer of its own that begins there."""
    name = f"{buffer.name}_part"
    strides = [tirx.Var(f"{name}_{i}", "int64") for i in range(len(region))]
    own = tirx.decl_buffer(
        [r.extent for r in region], buffer.dtype, name, strides=strides, elem_offset=tirx.Var(f"{name}_at", "int64"),
        scope=buffer.scope(), offset_factor=1,
    )  # fmt: skip
    return MatchBufferRegion(own, tirx.BufferRegion(buffer, region))


def _i64(value: int) -> Any:
    return tirx.const(value, "int64")


def _first_iteration(body: Any) -> tuple[Any, list[tuple[Any, Any]]]:
    """The innermost statement of a nest, and its variables with their values in the first iteration."""
    values: list[tuple[Any, Any]] = []
    while isinstance(body, tirx.For | SBlockRealize):
        if isinstance(body, tirx.For):
            values.append((body.loop_var, body.min))
            body = body.body
        else:
            inner = body.block
            values += [(var.var, _substituted(value, values)) for var, value in zip(inner.iter_vars, body.iter_values, strict=True)]
            body = inner.body
    return body, values


def _substituted(node: Any, values: list[tuple[Any, Any]]) -> Any:
    def replace(var: Any) -> Any:
        return next((value for known, value in values if var.same_as(known)), var)

    return tvm_ffi.structural_map(node, (tirx.Var, replace))


def _swizzle(function: Any, wish: Swizzle) -> Any:
    """The chunk of global memory is another one; where it is put stays the same, which TVM's analysis of regions understands."""
    same = _EIGHT_ROWS * wish.chunk // wish.terms  # rows that share a swizzle: together they are as wide as the banks

    def visit(block: Any) -> Any:
        if block.name_hint != wish.block:
            return block
        known = sym.Analyzer()
        for axis in block.iter_vars:
            known.bind(axis.var, axis.dom)
        store = block.body
        indices = [known.simplify(index) for index in store.indices]
        row, term = _row_of_eight(store.buffer.shape, indices), indices[-1]
        inside = term % wish.terms
        other = term - inside + (inside // wish.chunk ^ row // same) * wish.chunk + inside % wish.chunk

        def load(old: Any) -> Any:
            return tirx.BufferLoad(old.source, [*old.indices[:-1], other]) if old.indices[-1].same_as(term) else old

        made = tirx.BufferStore(store.buffer, tvm_ffi.structural_map(store.value, (TensorLoad, load)), indices)
        fields = (block.init, block.alloc_buffers, block.match_buffers, block.annotations)
        return SBlock(block.iter_vars, block.reads, block.writes, block.name_hint, made, *fields)

    return function.with_body(tvm_ffi.structural_map(function.body, (SBlock, visit)))


def _row_of_eight(shape: Any, indices: list[Any]) -> Any:
    """The row, out of eight, by the last dimensions before that of the terms."""
    row, rows = _i64(0), 1
    for index, extent in reversed(list(zip(indices, shape, strict=True))[:-1]):
        row, rows = row + index * rows, rows * int(extent)
        if rows >= _EIGHT_ROWS:
            break
    return row % _EIGHT_ROWS


def _scatter_rows(function: Any) -> Any:
    """The last parameter, `output`, becomes `y`."""
    output, slot = function.params[-1], next(p for p in function.params if p.name == "slot")
    y = tirx.decl_buffer((tirx.Var("R", "int64"), output.shape[2]), output.dtype, "y")
    everywhere = tirx.BufferRegion(y, [Range(_i64(0), extent) for extent in y.shape])

    def store(old: Any) -> Any:
        if not old.buffer.same_as(output):
            return old
        b, m, n = old.indices
        kept = tirx.BufferStore(y, old.value, [slot[b, m].astype("int64"), n])
        return tirx.IfThenElse(slot[b, m] >= 0, kept, None)

    def declare(block: Any) -> Any:
        writes = [everywhere if region.source.same_as(output) else region for region in block.writes]
        if all(new is old for new, old in zip(writes, block.writes, strict=True)):
            return block
        fields = (block.init, block.alloc_buffers, block.match_buffers, block.annotations)
        return SBlock(block.iter_vars, block.reads, writes, block.name_hint, block.body, *fields)

    body = tvm_ffi.structural_map(function.body, [(tirx.BufferStore, store), (SBlock, declare)])
    return tirx.PrimFunc([*function.params[:-1], y], body, function.ret_type, function.attrs)


def _leave_early(function: Any, wish: LeaveEarly) -> Any:
    """A call of the macro `moegen_leave_if` first in the body of the loops that are threads."""
    expert = next(p for p in function.params if p.name == "expert")

    def visit(loop: Any) -> Any:
        thread = loop.thread_binding
        if thread is None or thread.thread_tag != "threadIdx.x" or not isinstance(loop.body, tirx.SeqStmt):
            return loop
        leave = tirx.Evaluate(tirx.call_extern("void", "moegen_leave_if", expert[wish.loop] < 0))
        body = tirx.SeqStmt([leave, *loop.body.seq])
        return tirx.For(loop.loop_var, loop.min, loop.extent, loop.kind, body, thread, loop.annotations)

    return function.with_body(tvm_ffi.structural_map(function.body, (tirx.For, visit)))


__all__ = ["rewrite"]
