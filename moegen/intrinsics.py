"""Machine instructions that schedules name and TVM does not have: `vdpbf16ps` on a panel's vector of numbers or codes, `vpdpbusd`.

Each is a definition, which TVM compares with the loops of a kernel, and an implementation that calls the function which
`schedules.llvm.machine` writes for LLVM.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.s_tir import TensorIntrin
from tvm.script import tirx as T

from .geometry import BYTES, Geometry
from .schedules.llvm import machine


def register(geometry: Geometry) -> None:
    """Makes the instructions that the products of a layer may use known to TVM's `tensorize`."""
    for product in (geometry.router, geometry.up):  # all products of experts are stored alike
        used = "bytes" if product.pair == BYTES else product.weight_dtype
        for stored in machine.DOTS if product.pair > 1 else ():
            if stored.removesuffix(machine.APART) == used:
                _register(stored)


@functools.cache
def _register(stored: str) -> None:
    function = machine.DOT_FUNCTIONS[stored]
    if stored == "bytes":
        pair = _bytes(), _bytes_call(function)
    elif stored in machine.NIBBLES:
        pair = _nibbles(_int4 if stored.startswith("int4") else _doubled_e2m1), _nibbles_call(function)
    else:
        pair = _pairs(stored), _pairs_call(stored, function)
    TensorIntrin.register(machine.DOTS[stored], *pair, override=True)


def _pairs(stored: str) -> Any:
    @T.prim_func(s_tir=True)
    def definition(
        rows: T.Buffer((2,), "bfloat16", offset_factor=1),
        weights: T.Buffer((16, 2), stored, offset_factor=1),
        sums: T.Buffer((16,), "float32", scope="local", offset_factor=1),
    ) -> None:
        with T.sblock("root"):
            T.reads(sums[0:16], rows[0:2], weights[0:16, 0:2])
            T.writes(sums[0:16])
            for lane in T.serial(0, 16):
                for term in T.serial(0, 2):
                    with T.sblock("update"):
                        v, p = T.axis.remap("SR", [lane, term])
                        sums[v] = sums[v] + T.cast(rows[p], "float32") * T.cast(weights[v, p], "float32")

    return definition


def _pairs_call(stored: str, function: str) -> Any:
    vector = f"{stored}x32"
    passed = "uint16x32" if stored == "bfloat16" else vector

    @T.prim_func(s_tir=True)
    def implementation(
        rows: T.Buffer((2,), "bfloat16", offset_factor=1),
        weights: T.Buffer((16, 2), stored, offset_factor=1),
        sums: T.Buffer((16,), "float32", scope="local", offset_factor=1),
    ) -> None:
        with T.sblock("root"):
            T.reads(sums[0:16], rows[0:2], weights[0:16, 0:2])
            T.writes(sums[0:16])
            sums[T.ramp(T.int32(0), 1, 16)] = T.call_pure_extern(
                "float32x16",
                function,
                sums.vload([0], "float32x16"),
                T.reinterpret(T.reinterpret(rows.vload([0], "bfloat16x2"), dtype="uint16x2"), dtype="int32"),
                T.reinterpret(weights.vload([0, 0], vector), dtype=passed),
            )

    return implementation


def _code(word: Any, pair: Any) -> Any:
    """The four bits of pair `pair` of terms."""
    return ((word >> (pair * 4).astype("uint16")) & tirx.const(15, "uint16")).astype("int32")


def _int4(word: Any, pair: Any) -> Any:
    """As the emitted module's `int4` says it."""
    return _code(word, pair) - 8


def _doubled_e2m1(word: Any, pair: Any) -> Any:
    """As the emitted module's `mxfp4` says it."""
    code = _code(word, pair)
    size = code & 7
    size = tirx.max(size, tirx.max(size * 2 - 4, size * 4 - 16))
    return tirx.Select(code > 7, 0 - size, size)


def _nibbles(value: Callable[[Any, Any], Any]) -> Any:
    """Eight terms whose codes lie in one vector; `value` says what the code of a word and a pair stands for."""

    @T.prim_func(s_tir=True)
    def definition(
        rows: T.Buffer((8,), "bfloat16", offset_factor=1),
        weights: T.Buffer((16, 2), "uint16", offset_factor=1),
        sums: T.Buffer((16,), "float32", scope="local", offset_factor=1),
    ) -> None:
        with T.sblock("root"):
            T.reads(sums[0:16], rows[0:8], weights[0:16, 0:2])
            T.writes(sums[0:16])
            for pair, lane, term in T.grid(4, 16, 2):
                with T.sblock("update"):
                    v, i, p = T.axis.remap("SRR", [lane, pair, term])
                    sums[v] = sums[v] + T.cast(rows[i * 2 + p], "float32") * T.cast(value(weights[v, p], i), "float32")

    return definition


def _nibbles_call(function: str) -> Any:
    @T.prim_func(s_tir=True)
    def implementation(
        rows: T.Buffer((8,), "bfloat16", offset_factor=1),
        weights: T.Buffer((16, 2), "uint16", offset_factor=1),
        sums: T.Buffer((16,), "float32", scope="local", offset_factor=1),
    ) -> None:
        with T.sblock("root"):
            T.reads(sums[0:16], rows[0:8], weights[0:16, 0:2])
            T.writes(sums[0:16])
            sums[T.ramp(T.int32(0), 1, 16)] = T.call_pure_extern(
                "float32x16",
                function,
                sums.vload([0], "float32x16"),
                T.reinterpret(T.reinterpret(rows.vload([0], "bfloat16x2"), dtype="uint16x2"), dtype="int32"),
                T.reinterpret(T.reinterpret(rows.vload([2], "bfloat16x2"), dtype="uint16x2"), dtype="int32"),
                T.reinterpret(T.reinterpret(rows.vload([4], "bfloat16x2"), dtype="uint16x2"), dtype="int32"),
                T.reinterpret(T.reinterpret(rows.vload([6], "bfloat16x2"), dtype="uint16x2"), dtype="int32"),
                weights.vload([0, 0], "uint16x32"),
            )

    return implementation


def _bytes() -> Any:
    @T.prim_func(s_tir=True)
    def definition(
        rows: T.Buffer((4,), "uint8", offset_factor=1),
        weights: T.Buffer((16, 4), "int8", offset_factor=1),
        sums: T.Buffer((16,), "int32", scope="local", offset_factor=1),
    ) -> None:
        with T.sblock("root"):
            T.reads(sums[0:16], rows[0:4], weights[0:16, 0:4])
            T.writes(sums[0:16])
            for lane, term in T.grid(16, 4):
                with T.sblock("update"):
                    v, p = T.axis.remap("SR", [lane, term])
                    sums[v] = sums[v] + T.cast(rows[p], "int32") * T.cast(weights[v, p], "int32")

    return definition


def _bytes_call(function: str) -> Any:
    @T.prim_func(s_tir=True)
    def implementation(
        rows: T.Buffer((4,), "uint8", offset_factor=1),
        weights: T.Buffer((16, 4), "int8", offset_factor=1),
        sums: T.Buffer((16,), "int32", scope="local", offset_factor=1),
    ) -> None:
        with T.sblock("root"):
            T.reads(sums[0:16], rows[0:4], weights[0:16, 0:4])
            T.writes(sums[0:16])
            sums[T.ramp(T.int32(0), 1, 16)] = T.call_pure_extern(
                "int32x16",
                function,
                sums.vload([0], "int32x16"),
                T.reinterpret(rows.vload([0], "uint8x4"), dtype="int32"),
                weights.vload([0, 0], "int8x64"),
            )

    return implementation


__all__ = ["register"]
