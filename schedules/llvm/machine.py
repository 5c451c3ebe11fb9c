"""Machine instructions that TVM has no word for: their names, and their definitions for LLVM."""

from __future__ import annotations

DOT = "moegen.dot_bf16"  # the tensor intrinsic's name in TVM
DOT_FUNCTION = "moegen_dot_bf16"
PREFETCH_FUNCTION = "moegen_prefetch"

_FEATURES = '"target-features"="+avx512bf16,+avx512f,+avx512bw,+avx512vl"'

# c[i] + a[0] * b[i][0] + a[1] * b[i][1] for 16 lanes. Vectors go by value: pointers would keep the sums in memory.
DOT_IR = f"""
declare <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float>, <32 x bfloat>, <32 x bfloat>)
define weak_odr <16 x float> @{DOT_FUNCTION}(<16 x float> %c, i32 %a, <32 x i16> %b) alwaysinline {_FEATURES} {{
  %first = insertelement <16 x i32> poison, i32 %a, i32 0
  %all = shufflevector <16 x i32> %first, <16 x i32> poison, <16 x i32> zeroinitializer
  %x = bitcast <16 x i32> %all to <32 x bfloat>
  %w = bitcast <32 x i16> %b to <32 x bfloat>
  %sum = call <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float> %c, <32 x bfloat> %x, <32 x bfloat> %w)
  ret <16 x float> %sum
}}
"""

# Says of itself that it touches no memory of the program: else the sums would be stored before each request.
PREFETCH_IR = f"""
declare void @llvm.prefetch.p0(ptr, i32, i32, i32)
define weak_odr void @{PREFETCH_FUNCTION}(ptr %line) alwaysinline {{
  call void @llvm.prefetch.p0(ptr %line, i32 0, i32 3, i32 1) memory(inaccessiblemem: readwrite)
  ret void
}}
"""
