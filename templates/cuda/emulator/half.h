// __half, __nv_bfloat16 and their pairs, with the conversions and operators that generated code uses.
//
// Sums, differences, products and quotients of two 16-bit numbers are exact enough in float32 that rounding the result once more
// gives what the device gives.
#pragma once
#include <math.h>

#include "numbers.h"
#include "vectors.h"

namespace emulator {

template <class Format>
struct Short {
  uint16_t bits;

  Short() = default;
  Short(float value) : bits(Format::Narrow(value)) {}
  Short(double value) : bits(Format::Narrow(static_cast<float>(value))) {}
  Short(int value) : Short(static_cast<float>(value)) {}
  Short(unsigned value) : Short(static_cast<float>(value)) {}
  Short(long value) : Short(static_cast<float>(value)) {}
  Short(unsigned long value) : Short(static_cast<float>(value)) {}
  Short(long long value) : Short(static_cast<float>(value)) {}
  Short(unsigned long long value) : Short(static_cast<float>(value)) {}
  operator float() const { return Format::Widen(bits); }
  float Wide() const { return Format::Widen(bits); }

  Short& operator+=(Short other) { return *this = *this + other; }
  Short& operator-=(Short other) { return *this = *this - other; }
  Short& operator*=(Short other) { return *this = *this * other; }
  Short& operator/=(Short other) { return *this = *this / other; }
  Short operator-() const { return FromBits(bits ^ 0x8000); }

  static Short FromBits(unsigned bits) {
    Short made;
    made.bits = static_cast<uint16_t>(bits);
    return made;
  }
  friend Short operator+(Short a, Short b) { return a.Wide() + b.Wide(); }
  friend Short operator-(Short a, Short b) { return a.Wide() - b.Wide(); }
  friend Short operator*(Short a, Short b) { return a.Wide() * b.Wide(); }
  friend Short operator/(Short a, Short b) { return a.Wide() / b.Wide(); }
  friend bool operator==(Short a, Short b) { return a.Wide() == b.Wide(); }
  friend bool operator!=(Short a, Short b) { return a.Wide() != b.Wide(); }
  friend bool operator<(Short a, Short b) { return a.Wide() < b.Wide(); }
  friend bool operator<=(Short a, Short b) { return a.Wide() <= b.Wide(); }
  friend bool operator>(Short a, Short b) { return a.Wide() > b.Wide(); }
  friend bool operator>=(Short a, Short b) { return a.Wide() >= b.Wide(); }
};

template <class Format>
struct alignas(4) ShortPair {
  Short<Format> x, y;

  ShortPair() = default;
  ShortPair(Short<Format> x, Short<Format> y) : x(x), y(y) {}
  friend ShortPair operator+(ShortPair a, ShortPair b) { return {a.x + b.x, a.y + b.y}; }
  friend ShortPair operator-(ShortPair a, ShortPair b) { return {a.x - b.x, a.y - b.y}; }
  friend ShortPair operator*(ShortPair a, ShortPair b) { return {a.x * b.x, a.y * b.y}; }
};

}  // namespace emulator

using __half = emulator::Short<emulator::Half>;
using __half2 = emulator::ShortPair<emulator::Half>;
using half = __half;
using half2 = __half2;
using __nv_bfloat16 = emulator::Short<emulator::BFloat>;
using __nv_bfloat162 = emulator::ShortPair<emulator::BFloat>;
using nv_bfloat16 = __nv_bfloat16;
using nv_bfloat162 = __nv_bfloat162;

// ---------------------------------------------------------------- functions of both types

#define MOEGEN_SHORT_FUNCTIONS(S, P)                                                             \
  inline S __hadd(S a, S b) { return a + b; }                                                    \
  inline S __hsub(S a, S b) { return a - b; }                                                    \
  inline S __hmul(S a, S b) { return a * b; }                                                    \
  inline S __hdiv(S a, S b) { return a / b; }                                                    \
  inline S __hneg(S a) { return -a; }                                                            \
  inline S __habs(S a) { return S::FromBits(a.bits & 0x7fff); }                                  \
  inline S __hfma(S a, S b, S c) { return static_cast<double>(a.Wide()) * b.Wide() + c.Wide(); } \
  inline S __hmax(S a, S b) { return fmaxf(a, b); }                                              \
  inline S __hmin(S a, S b) { return fminf(a, b); }                                              \
  inline bool __heq(S a, S b) { return a == b; }                                                 \
  inline bool __hne(S a, S b) { return a != b; }                                                 \
  inline bool __hlt(S a, S b) { return a < b; }                                                  \
  inline bool __hle(S a, S b) { return a <= b; }                                                 \
  inline bool __hgt(S a, S b) { return a > b; }                                                  \
  inline bool __hge(S a, S b) { return a >= b; }                                                 \
  inline bool __hisnan(S a) { return a != a; }                                                   \
  inline S hexp(S a) { return expf(a); }                                                         \
  inline S hexp2(S a) { return exp2f(a); }                                                       \
  inline S hlog(S a) { return logf(a); }                                                         \
  inline S hlog2(S a) { return log2f(a); }                                                       \
  inline S hsqrt(S a) { return sqrtf(a); }                                                       \
  inline S hrsqrt(S a) { return 1.0f / sqrtf(a); }                                               \
  inline S hrcp(S a) { return 1.0f / a.Wide(); }                                                 \
  inline S hsin(S a) { return sinf(a); }                                                         \
  inline S hcos(S a) { return cosf(a); }                                                         \
  inline S htanh(S a) { return tanhf(a); }                                                       \
  inline S hfloor(S a) { return floorf(a); }                                                     \
  inline S hceil(S a) { return ceilf(a); }                                                       \
  inline S hrint(S a) { return rintf(a); }                                                       \
  inline P __hadd2(P a, P b) { return a + b; }                                                   \
  inline P __hsub2(P a, P b) { return a - b; }                                                   \
  inline P __hmul2(P a, P b) { return a * b; }                                                   \
  inline P __hfma2(P a, P b, P c) { return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)}; }     \
  inline P __hmax2(P a, P b) { return {__hmax(a.x, b.x), __hmax(a.y, b.y)}; }                    \
  inline P __hmin2(P a, P b) { return {__hmin(a.x, b.x), __hmin(a.y, b.y)}; }

MOEGEN_SHORT_FUNCTIONS(__half, __half2)
MOEGEN_SHORT_FUNCTIONS(__nv_bfloat16, __nv_bfloat162)
#undef MOEGEN_SHORT_FUNCTIONS

// ---------------------------------------------------------------- conversions by name

inline __half __float2half(float a) { return a; }
inline __half __float2half_rn(float a) { return a; }
inline float __half2float(__half a) { return a; }
inline __half2 __floats2half2_rn(float x, float y) { return {__half(x), __half(y)}; }
inline __half2 __float22half2_rn(float2 a) { return {__half(a.x), __half(a.y)}; }
inline __half2 __float2half2_rn(float a) { return {__half(a), __half(a)}; }
inline float2 __half22float2(__half2 a) { return {a.x, a.y}; }
inline float __low2float(__half2 a) { return a.x; }
inline float __high2float(__half2 a) { return a.y; }
inline __half __low2half(__half2 a) { return a.x; }
inline __half __high2half(__half2 a) { return a.y; }
inline __half2 __halves2half2(__half x, __half y) { return {x, y}; }
inline __half2 __half2half2(__half a) { return {a, a}; }
inline __half2 make_half2(__half x, __half y) { return {x, y}; }
inline unsigned short __half_as_ushort(__half a) { return a.bits; }
inline short __half_as_short(__half a) { return static_cast<short>(a.bits); }
inline __half __ushort_as_half(unsigned short a) { return __half::FromBits(a); }
inline __half __short_as_half(short a) { return __half::FromBits(static_cast<unsigned short>(a)); }

inline __nv_bfloat16 __float2bfloat16(float a) { return a; }
inline __nv_bfloat16 __float2bfloat16_rn(float a) { return a; }
inline float __bfloat162float(__nv_bfloat16 a) { return a; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__nv_bfloat16(x), __nv_bfloat16(y)}; }
inline __nv_bfloat162 __float22bfloat162_rn(float2 a) { return {__nv_bfloat16(a.x), __nv_bfloat16(a.y)}; }
inline __nv_bfloat162 __float2bfloat162_rn(float a) { return {__nv_bfloat16(a), __nv_bfloat16(a)}; }
inline float2 __bfloat1622float2(__nv_bfloat162 a) { return {a.x, a.y}; }
inline float __low2float(__nv_bfloat162 a) { return a.x; }
inline float __high2float(__nv_bfloat162 a) { return a.y; }
inline __nv_bfloat16 __low2bfloat16(__nv_bfloat162 a) { return a.x; }
inline __nv_bfloat16 __high2bfloat16(__nv_bfloat162 a) { return a.y; }
inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) { return {x, y}; }
inline __nv_bfloat162 __bfloat162bfloat162(__nv_bfloat16 a) { return {a, a}; }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 a) { return a.bits; }
inline short __bfloat16_as_short(__nv_bfloat16 a) { return static_cast<short>(a.bits); }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short a) { return __nv_bfloat16::FromBits(a); }
inline __nv_bfloat16 __short_as_bfloat16(short a) { return __nv_bfloat16::FromBits(static_cast<unsigned short>(a)); }
