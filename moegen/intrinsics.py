"""Machine instructions that schedules name and TVM does not have: `vdpbf16ps` on a panel's vector."""

from __future__ import annotations

from typing import Any

from tvm.s_tir import TensorIntrin
from tvm.script import tirx as T

from .schedules.llvm import machine


def register() -> None:
    """Makes the instructions known to TVM's `tensorize`."""
    TensorIntrin.register(machine.DOT, _definition(), _implementation(), override=True)


def _definition() -> Any:
    @T.prim_func(s_tir=True)
    def definition(
        rows: T.Buffer((2,), "bfloat16", offset_factor=1),
        weights: T.Buffer((16, 2), "bfloat16", offset_factor=1),
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


def _implementation() -> Any:
    function = machine.DOT_FUNCTION

    @T.prim_func(s_tir=True)
    def implementation(
        rows: T.Buffer((2,), "bfloat16", offset_factor=1),
        weights: T.Buffer((16, 2), "bfloat16", offset_factor=1),
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
                T.reinterpret(weights.vload([0, 0], "bfloat16x32"), dtype="uint16x32"),
            )

    return implementation


__all__ = ["register"]
