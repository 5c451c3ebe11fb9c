// What CUDA C has beyond C++: mathematics, bits, loads with hints, atomics, warps and barriers.
#pragma once
#include <float.h>
#include <limits.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <type_traits>

#include "half.h"
#include "runtime.h"

constexpr int warpSize = 32;

// ---------------------------------------------------------------- mathematics

#define MOEGEN_EXTREMES(type)                               \
  inline type max(type a, type b) { return a > b ? a : b; } \
  inline type min(type a, type b) { return a < b ? a : b; }
MOEGEN_EXTREMES(int)
MOEGEN_EXTREMES(unsigned)
MOEGEN_EXTREMES(long)
MOEGEN_EXTREMES(unsigned long)
MOEGEN_EXTREMES(long long)
MOEGEN_EXTREMES(unsigned long long)
#undef MOEGEN_EXTREMES
inline float max(float a, float b) { return fmaxf(a, b); }
inline float min(float a, float b) { return fminf(a, b); }
inline double max(double a, double b) { return fmax(a, b); }
inline double min(double a, double b) { return fmin(a, b); }

inline float rsqrtf(float a) { return 1.0f / sqrtf(a); }
inline double rsqrt(double a) { return 1.0 / sqrt(a); }
inline float __expf(float a) { return expf(a); }
inline float __exp10f(float a) { return exp2f(a * 3.3219280949f); }
inline float __logf(float a) { return logf(a); }
inline float __log2f(float a) { return log2f(a); }
inline float __log10f(float a) { return log10f(a); }
inline float __powf(float a, float b) { return powf(a, b); }
inline float __sinf(float a) { return sinf(a); }
inline float __cosf(float a) { return cosf(a); }
inline float __tanf(float a) { return tanf(a); }
inline float __tanhf(float a) { return tanhf(a); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline float __frsqrt_rn(float a) { return 1.0f / sqrtf(a); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __saturatef(float a) { return a > 0.0f ? fminf(a, 1.0f) : 0.0f; }

// ---------------------------------------------------------------- numbers and bits

inline int __float_as_int(float a) { return emulator::Bits<int>(a); }
inline unsigned __float_as_uint(float a) { return emulator::Bits<unsigned>(a); }
inline float __int_as_float(int a) { return emulator::Bits<float>(a); }
inline float __uint_as_float(unsigned a) { return emulator::Bits<float>(a); }
inline long long __double_as_longlong(double a) { return emulator::Bits<long long>(a); }
inline double __longlong_as_double(long long a) { return emulator::Bits<double>(a); }
inline float __int2float_rn(int a) { return static_cast<float>(a); }
inline float __uint2float_rn(unsigned a) { return static_cast<float>(a); }

namespace emulator {
// Conversions to integers saturate, and NaN becomes 0.
template <class To>
inline To Integer(float a) {
  constexpr double low = std::is_signed_v<To> ? -2147483648.0 : 0.0, high = std::is_signed_v<To> ? 2147483647.0 : 4294967295.0;
  if (a != a) return 0;
  return static_cast<To>(fmin(fmax(static_cast<double>(a), low), high));
}
}  // namespace emulator
inline int __float2int_rn(float a) { return emulator::Integer<int>(nearbyintf(a)); }
inline int __float2int_rz(float a) { return emulator::Integer<int>(truncf(a)); }
inline int __float2int_rd(float a) { return emulator::Integer<int>(floorf(a)); }
inline int __float2int_ru(float a) { return emulator::Integer<int>(ceilf(a)); }
inline unsigned __float2uint_rn(float a) { return emulator::Integer<unsigned>(nearbyintf(a)); }
inline unsigned __float2uint_rz(float a) { return emulator::Integer<unsigned>(truncf(a)); }

inline int __popc(unsigned a) { return __builtin_popcount(a); }
inline int __popcll(unsigned long long a) { return __builtin_popcountll(a); }
inline int __ffs(int a) { return __builtin_ffs(a); }
inline int __ffsll(long long a) { return __builtin_ffsll(a); }
inline int __clz(int a) { return a == 0 ? 32 : __builtin_clz(static_cast<unsigned>(a)); }
inline int __clzll(long long a) { return a == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(a)); }
inline unsigned __brev(unsigned a) {
  unsigned reversed = 0;
  for (int i = 0; i < 32; ++i) reversed |= (a >> i & 1) << (31 - i);
  return reversed;
}
inline int __mul24(int a, int b) { return a * b; }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t{a} * b >> 32); }
inline int __mulhi(int a, int b) { return static_cast<int>(int64_t{a} * b >> 32); }
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned by) {
  return static_cast<unsigned>(((uint64_t{high} << 32 | low) << (by & 31)) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned by) {
  return static_cast<unsigned>((uint64_t{high} << 32 | low) >> (by & 31));
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  uint64_t both = uint64_t{b} << 32 | a;
  unsigned made = 0;
  for (int i = 0; i < 4; ++i) {
    unsigned choice = selector >> (4 * i) & 15;
    unsigned byte = static_cast<unsigned>(both >> (8 * (choice & 7)) & 255);
    if (choice & 8) byte = byte & 128 ? 255 : 0;
    made |= byte << (8 * i);
  }
  return made;
}
inline int __dp4a(int a, int b, int c) {
  for (int i = 0; i < 32; i += 8) c += static_cast<int8_t>(a >> i) * static_cast<int8_t>(b >> i);
  return c;
}

// ---------------------------------------------------------------- memory

#define MOEGEN_LOADS(name)     \
  template <class T>           \
  inline T name(const T* at) { \
    return *at;                \
  }
MOEGEN_LOADS(__ldg)
MOEGEN_LOADS(__ldca)
MOEGEN_LOADS(__ldcg)
MOEGEN_LOADS(__ldcs)
MOEGEN_LOADS(__ldlu)
MOEGEN_LOADS(__ldcv)
#undef MOEGEN_LOADS
#define MOEGEN_STORES(name)          \
  template <class T>                 \
  inline void name(T* at, T value) { \
    *at = value;                     \
  }
MOEGEN_STORES(__stwb)
MOEGEN_STORES(__stcg)
MOEGEN_STORES(__stcs)
MOEGEN_STORES(__stwt)
#undef MOEGEN_STORES

inline size_t __cvta_generic_to_shared(const void* pointer) { return emulator::SharedAddress(pointer); }
inline size_t __cvta_generic_to_global(const void* pointer) { return reinterpret_cast<size_t>(pointer); }
inline bool __isShared(const void* pointer) { return emulator::IsShared(pointer); }
inline bool __isGlobal(const void* pointer) { return !emulator::IsShared(pointer); }
inline void* __cvta_shared_to_generic(size_t address) {
  return emulator::SharedPointer(static_cast<uint32_t>(address), 1, 1, "__cvta_shared_to_generic");
}

inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_block() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_system() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

// ---------------------------------------------------------------- atomics (blocks may run on several threads of the processor)

namespace emulator {
template <class T, class Change>
inline T Atomically(T* at, Change change) {
  using Raw = std::conditional_t<sizeof(T) == 2, uint16_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>>;
  auto* raw = reinterpret_cast<Raw*>(at);
  Raw seen = __atomic_load_n(raw, __ATOMIC_RELAXED);
  for (;;) {
    T old = Bits<T>(seen);
    if (__atomic_compare_exchange_n(raw, &seen, Bits<Raw>(static_cast<T>(change(old))), false, __ATOMIC_SEQ_CST,
                                    __ATOMIC_RELAXED)) {
      return old;
    }
  }
}
template <class T>
using Same = std::common_type_t<T>;  // the value's type follows the pointer's
}  // namespace emulator

#define MOEGEN_ATOMIC(name, expression)                                     \
  template <class T>                                                        \
  inline T name(T* at, emulator::Same<T> value) {                           \
    return emulator::Atomically(at, [value](T old) { return expression; }); \
  }                                                                         \
  template <class T>                                                        \
  inline T name##_block(T* at, emulator::Same<T> value) {                   \
    return name(at, value);                                                 \
  }
MOEGEN_ATOMIC(atomicAdd, old + value)
MOEGEN_ATOMIC(atomicSub, old - value)
MOEGEN_ATOMIC(atomicMax, old < value ? value : old)
MOEGEN_ATOMIC(atomicMin, value < old ? value : old)
MOEGEN_ATOMIC(atomicAnd, old& value)
MOEGEN_ATOMIC(atomicOr, old | value)
MOEGEN_ATOMIC(atomicXor, old ^ value)
MOEGEN_ATOMIC(atomicInc, old >= value ? T{0} : old + 1)
MOEGEN_ATOMIC(atomicDec, old == 0 || old > value ? value : old - 1)
#undef MOEGEN_ATOMIC
template <class T>
inline T atomicExch(T* at, emulator::Same<T> value) {
  emulator::Yield();  // locks are taken with it: whoever has one must get on
  return emulator::Atomically(at, [value](T) { return value; });
}
template <class T>
inline T atomicCAS(T* at, emulator::Same<T> expected, emulator::Same<T> value) {
  emulator::Yield();
  return emulator::Atomically(at, [=](T old) { return old == expected ? value : old; });
}

// ---------------------------------------------------------------- warps

namespace emulator {

template <class T>
struct Shuffle {
  T value;
  int source;  // lane
};

template <class T>
inline void PerformShuffle(void* const* operands, uint32_t lanes) {
  T values[kWarp];
  for (uint32_t left = lanes; left != 0; left &= left - 1) {
    int lane = __builtin_ctz(left);
    values[lane] = static_cast<Shuffle<T>*>(operands[lane])->value;
  }
  for (uint32_t left = lanes; left != 0; left &= left - 1) {
    auto* mine = static_cast<Shuffle<T>*>(operands[__builtin_ctz(left)]);
    if (lanes >> mine->source & 1) {
      mine->value = values[mine->source];
    } else {  // undefined on the device
      memset(static_cast<void*>(&mine->value), kPoison, sizeof(T));
    }
  }
}
template <class T>
inline const Operation kShuffle{"a warp shuffle", PerformShuffle<T>};

template <class T>
inline T Shuffled(uint32_t mask, T value, int source) {
  Shuffle<T> mine{value, source};
  Meet(mask, kShuffle<T>, &mine);
  return mine.value;
}
inline int Lane() { return static_cast<int>(current->lane); }

uint32_t Ballot(uint32_t mask, bool value);
void SynchronizeWarp(uint32_t mask);

template <class T>
inline uint32_t MatchAny(uint32_t mask, T value) {
  uint32_t same = 0;
  for (int lane = 0; lane < 32; ++lane) {
    if (mask >> lane & 1) same |= static_cast<uint32_t>(Shuffled(mask, value, lane) == value) << lane;
  }
  return same;
}
template <class T, class Combine>
inline T Reduced(uint32_t mask, T value, Combine combine) {
  T total = value;
  for (int lane = 0; lane < 32; ++lane) {
    if ((mask >> lane & 1) == 0) continue;
    T other = Shuffled(mask, value, lane);
    if (lane != Lane()) total = combine(total, other);
  }
  return total;
}

}  // namespace emulator

// A segment is `width` lanes; a source outside of it gives the lane's own value.
template <class T>
inline T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
  return emulator::Shuffled(mask, value, (emulator::Lane() & -width) + (lane & (width - 1)));
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32) {
  int from = emulator::Lane() - static_cast<int>(by);
  return emulator::Shuffled(mask, value, from < (emulator::Lane() & -width) ? emulator::Lane() : from);
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32) {
  int from = emulator::Lane() + static_cast<int>(by);
  return emulator::Shuffled(mask, value, from > (emulator::Lane() | (width - 1)) ? emulator::Lane() : from);
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int with, int width = 32) {
  int from = emulator::Lane() ^ with;
  return emulator::Shuffled(mask, value, from > (emulator::Lane() | (width - 1)) ? emulator::Lane() : from);
}
inline unsigned __activemask() { return emulator::ActiveMask(); }
inline unsigned __ballot_sync(unsigned mask, int value) { return emulator::Ballot(mask, value != 0); }
inline int __any_sync(unsigned mask, int value) { return emulator::Ballot(mask, value != 0) != 0; }
inline int __all_sync(unsigned mask, int value) { return emulator::Ballot(mask, value == 0) == 0; }
inline void __syncwarp(unsigned mask = 0xffffffffu) { emulator::SynchronizeWarp(mask); }
template <class T>
inline unsigned __match_any_sync(unsigned mask, T value) {
  return emulator::MatchAny(mask, value);
}
inline unsigned __reduce_add_sync(unsigned mask, unsigned value) {
  return emulator::Reduced(mask, value, [](unsigned a, unsigned b) { return a + b; });
}
inline int __reduce_add_sync(unsigned mask, int value) {
  return static_cast<int>(__reduce_add_sync(mask, static_cast<unsigned>(value)));
}
template <class T>
inline T __reduce_max_sync(unsigned mask, T value) {
  return emulator::Reduced(mask, value, [](T a, T b) { return a < b ? b : a; });
}
template <class T>
inline T __reduce_min_sync(unsigned mask, T value) {
  return emulator::Reduced(mask, value, [](T a, T b) { return b < a ? b : a; });
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned value) {
  return emulator::Reduced(mask, value, [](unsigned a, unsigned b) { return a | b; });
}
inline unsigned __reduce_and_sync(unsigned mask, unsigned value) {
  return emulator::Reduced(mask, value, [](unsigned a, unsigned b) { return a & b; });
}

// ---------------------------------------------------------------- time

inline long long clock64() { return 0; }
inline void __nanosleep(unsigned) { emulator::Yield(); }
[[noreturn]] inline void __trap() { emulator::Fail("__trap()"); }
