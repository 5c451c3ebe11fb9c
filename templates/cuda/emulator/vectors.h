// CUDA's vector types, with its sizes and alignments.
#pragma once
#include <cstdint>

#define MOEGEN_VECTORS(base, type, half_align, align)                         \
  struct base##1 { type x; };                                                 \
  struct alignas(half_align) base##2 { type x, y; };                          \
  struct base##3 { type x, y, z; };                                           \
  struct alignas(align) base##4 { type x, y, z, w; };                         \
  inline base##1 make_##base##1(type x) { return {x}; }                       \
  inline base##2 make_##base##2(type x, type y) { return {x, y}; }            \
  inline base##3 make_##base##3(type x, type y, type z) { return {x, y, z}; } \
  inline base##4 make_##base##4(type x, type y, type z, type w) { return {x, y, z, w}; }

MOEGEN_VECTORS(char, signed char, 2, 4)
MOEGEN_VECTORS(uchar, unsigned char, 2, 4)
MOEGEN_VECTORS(short, short, 4, 8)
MOEGEN_VECTORS(ushort, unsigned short, 4, 8)
MOEGEN_VECTORS(int, int, 8, 16)
MOEGEN_VECTORS(uint, unsigned, 8, 16)
MOEGEN_VECTORS(long, long, 16, 16)
MOEGEN_VECTORS(ulong, unsigned long, 16, 16)
MOEGEN_VECTORS(longlong, long long, 16, 16)
MOEGEN_VECTORS(ulonglong, unsigned long long, 16, 16)
MOEGEN_VECTORS(float, float, 8, 16)
MOEGEN_VECTORS(double, double, 16, 16)
#undef MOEGEN_VECTORS

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
