"""Machine instructions that TVM has no word for: their names, and their definitions for LLVM."""

from __future__ import annotations

import struct

PREFETCH_FUNCTION = "moegen_prefetch"

APART = "_apart"  # suffix: the products of one call are added up before they meet the sums
NIBBLES = ("int4", "mxfp4", f"int4{APART}", f"mxfp4{APART}")
# Tensor intrinsics: what the weights are stored as -> the name in TVM, and of the function that a kernel calls.
DOTS = {stored: f"moegen.dot_{stored}" for stored in ("bfloat16", "int8", *NIBBLES, "bytes")}
DOT_FUNCTIONS = {stored: name.replace(".", "_") for stored, name in DOTS.items()}

_FEATURES = '"target-features"="+avx512bf16,+avx512f,+avx512bw,+avx512vl"'
_VNNI_FEATURES = '"target-features"="+avx512vnni,+avx512f,+avx512bw,+avx512vl"'

_DPBF16_NAME = "@llvm.x86.avx512bf16.dpbf16ps.512"
_DPBF16 = f"declare <16 x float> {_DPBF16_NAME}(<16 x float>, <32 x bfloat>, <32 x bfloat>)"


def _dot(result: str, sums: str, row: str, weights: str) -> str:
    """One `vdpbf16ps`: the pair `row` (i32) with each pair of `weights` (<32 x bfloat>)."""
    return f"""  %{result}.1 = insertelement <16 x i32> poison, i32 {row}, i32 0
  %{result}.2 = shufflevector <16 x i32> %{result}.1, <16 x i32> poison, <16 x i32> zeroinitializer
  %{result}.3 = bitcast <16 x i32> %{result}.2 to <32 x bfloat>
  %{result} = call <16 x float> {_DPBF16_NAME}(<16 x float> {sums}, <32 x bfloat> %{result}.3, <32 x bfloat> {weights})"""


# c[i] + a[0] * b[i][0] + a[1] * b[i][1] for 16 lanes. Vectors go by value: pointers would keep the sums in memory.
_BFLOAT16_IR = f"""
{_DPBF16}
define weak_odr <16 x float> @{DOT_FUNCTIONS["bfloat16"]}(<16 x float> %c, i32 %a, <32 x i16> %b) alwaysinline {_FEATURES} {{
  %w = bitcast <32 x i16> %b to <32 x bfloat>
{_dot("sum", "%c", "%a", "%w")}
  ret <16 x float> %sum
}}
"""

# The same with codes of a byte, which bfloat16 holds exactly.
_INT8_IR = f"""
{_DPBF16}
declare <32 x bfloat> @llvm.x86.avx512bf16.cvtne2ps2bf16.512(<16 x float>, <16 x float>)
define weak_odr <16 x float> @{DOT_FUNCTIONS["int8"]}(<16 x float> %c, i32 %a, <32 x i8> %b) alwaysinline {_FEATURES} {{
  %wide = sext <32 x i8> %b to <32 x i32>
  %float = sitofp <32 x i32> %wide to <32 x float>
  %low = shufflevector <32 x float> %float, <32 x float> poison, <16 x i32> <{", ".join(f"i32 {i}" for i in range(16))}>
  %high = shufflevector <32 x float> %float, <32 x float> poison, <16 x i32> <{", ".join(f"i32 {i}" for i in range(16, 32))}>
  %w = call <32 x bfloat> @llvm.x86.avx512bf16.cvtne2ps2bf16.512(<16 x float> %high, <16 x float> %low)
{_dot("sum", "%c", "%a", "%w")}
  ret <16 x float> %sum
}}
"""


def _nibbles_ir(stored: str) -> str:
    """Four pairs of terms whose codes lie in one vector; `vpermw` looks at the lowest five bits of each word and so finds a code's
    value in a table that is there twice, whatever the bits above the code are.

    Apart, one call waits for the last by the three cycles of an addition rather than by the latency of four `vdpbf16ps`.
    """
    values, apart = _NIBBLE_VALUES[stored.removesuffix(APART)], stored.endswith(APART)
    table = ", ".join(f"i16 {_bfloat16_bits(value)}" for value in [*values, *values])
    steps, sums = [], "zeroinitializer" if apart else "%c"
    for i in range(4):
        steps.append(f"""  %x{i} = lshr <32 x i16> %b, splat (i16 {4 * i})
  %v{i} = call <32 x i16> @llvm.x86.avx512.permvar.hi.512(<32 x i16> <{table}>, <32 x i16> %x{i})
  %w{i} = bitcast <32 x i16> %v{i} to <32 x bfloat>
{_dot(f"sum{i}", sums, f"%a{i}", f"%w{i}")}""")
        sums = f"%sum{i}"
    if apart:
        steps.append(f"  %sum = fadd <16 x float> %c, {sums}")
        sums = "%sum"
    rows = ", ".join(f"i32 %a{i}" for i in range(4))
    body = "\n".join(steps)
    return f"""
{_DPBF16}
declare <32 x i16> @llvm.x86.avx512.permvar.hi.512(<32 x i16>, <32 x i16>)
define weak_odr <16 x float> @{DOT_FUNCTIONS[stored]}(<16 x float> %c, {rows}, <32 x i16> %b) alwaysinline {_FEATURES} {{
{body}
  ret <16 x float> {sums}
}}
"""


def _bfloat16_bits(value: float) -> int:
    """As a signed number of 16 bits; `value` is one that bfloat16 holds."""
    bits: int = struct.unpack("<h", struct.pack("<f", value)[2:])[0]
    return bits


# c[i] + a[0] * b[i][0] + ... + a[3] * b[i][3] of unsigned a and signed b.
_BYTES_IR = f"""
declare <16 x i32> @llvm.x86.avx512.vpdpbusd.512(<16 x i32>, <64 x i8>, <64 x i8>)
define weak_odr <16 x i32> @{DOT_FUNCTIONS["bytes"]}(<16 x i32> %c, i32 %a, <64 x i8> %b) alwaysinline {_VNNI_FEATURES} {{
  %first = insertelement <16 x i32> poison, i32 %a, i32 0
  %all = shufflevector <16 x i32> %first, <16 x i32> poison, <16 x i32> zeroinitializer
  %x = bitcast <16 x i32> %all to <64 x i8>
  %sum = call <16 x i32> @llvm.x86.avx512.vpdpbusd.512(<16 x i32> %c, <64 x i8> %x, <64 x i8> %b)
  ret <16 x i32> %sum
}}
"""

DOUBLED_E2M1 = (0, 1, 2, 3, 4, 6, 8, 12)  # OCP Microscaling v1.0, without the sign
_NIBBLE_VALUES = {"int4": range(-8, 8), "mxfp4": (*DOUBLED_E2M1, *(-value for value in DOUBLED_E2M1))}
DOT_IR = {
    "bfloat16": _BFLOAT16_IR,
    "int8": _INT8_IR,
    **{stored: _nibbles_ir(stored) for stored in NIBBLES},
    "bytes": _BYTES_IR,
}

# Says of itself that it touches no memory of the program: else the sums would be stored before each request.
PREFETCH_IR = f"""
declare void @llvm.prefetch.p0(ptr, i32, i32, i32)
define weak_odr void @{PREFETCH_FUNCTION}(ptr %line) alwaysinline {{
  call void @llvm.prefetch.p0(ptr %line, i32 0, i32 3, i32 1) memory(inaccessiblemem: readwrite)
  ret void
}}
"""
