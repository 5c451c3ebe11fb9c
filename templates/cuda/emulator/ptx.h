// PTX instructions, one function each: moegen/cuda/ptx.py turns asm statements into calls of these.
//
// Registers are C++ variables, whose type need not be the instruction's: `As` reads one as another type of the same size, `Put`
// writes one.
#pragma once
#include <type_traits>

#include "half.h"
#include "runtime.h"

namespace emulator::ptx {

// ---------------------------------------------------------------- registers

// What an input operand is inside an asm statement, by its constraint.
template <class T>
inline auto Raw(T value) {
  if constexpr (std::is_pointer_v<T>) {
    return reinterpret_cast<uint64_t>(value);
  } else if constexpr (std::is_enum_v<T>) {
    return static_cast<std::underlying_type_t<T>>(value);
  } else {
    return value;
  }
}
template <class T>
inline uint16_t TakeH(T value) {
  return Bits<uint16_t>(value);
}
template <class T>
inline uint32_t TakeR(T value) {
  if constexpr (sizeof(T) == 4) return Bits<uint32_t>(value);
  return static_cast<uint32_t>(Raw(value));
}
template <class T>
inline uint64_t TakeL(T value) {
  return static_cast<uint64_t>(Raw(value));
}
inline float TakeF(float value) { return value; }
inline double TakeD(double value) { return value; }
template <class T>
constexpr T TakeN(T value) {
  return value;
}

template <class To, class From>
inline To As(From from) {
  if constexpr (std::is_same_v<To, From>) {
    return from;
  } else if constexpr (std::is_pointer_v<From>) {
    return static_cast<To>(reinterpret_cast<uint64_t>(from));
  } else if constexpr (sizeof(To) == sizeof(From)) {
    return Bits<To>(from);
  } else {
    return static_cast<To>(from);
  }
}
template <class To, class From>
inline void Put(To& to, From from) {
  if constexpr (std::is_pointer_v<To>) {
    to = reinterpret_cast<To>(static_cast<uint64_t>(from));
  } else if constexpr (std::is_same_v<To, bool>) {
    to = from != 0;
  } else if constexpr (sizeof(To) == sizeof(From)) {
    to = Bits<To>(from);
  } else {
    to = static_cast<To>(from);
  }
}

// ---------------------------------------------------------------- arithmetic

#define MOEGEN_BINARY(name, expression)                                \
  template <class T, class D, class A, class B>                        \
  inline void name(D& d, A first, B second) {                          \
    T a = As<T>(first), b = As<T>(second);                             \
    Put(d, static_cast<T>(expression));                                \
  }
MOEGEN_BINARY(Add, a + b)
MOEGEN_BINARY(Sub, a - b)
MOEGEN_BINARY(Mul, a* b)
MOEGEN_BINARY(Div, a / b)
MOEGEN_BINARY(Rem, a % b)
MOEGEN_BINARY(And, a& b)
MOEGEN_BINARY(Or, a | b)
MOEGEN_BINARY(Xor, a ^ b)
MOEGEN_BINARY(Min, a < b ? a : b)
MOEGEN_BINARY(Max, a > b ? a : b)
#undef MOEGEN_BINARY
template <class T, class D, class A, class B>
inline void Shl(D& d, A a, B by) {
  Put(d, static_cast<T>(As<uint32_t>(by) >= 8 * sizeof(T) ? T{0} : As<T>(a) << As<uint32_t>(by)));
}
template <class T, class D, class A, class B>
inline void Shr(D& d, A a, B by) {
  uint32_t most = 8 * sizeof(T) - 1, shift = As<uint32_t>(by);
  T value = As<T>(a);
  Put(d, static_cast<T>(shift <= most ? value >> shift : (value >> most) >> 1));
}
template <class T, class D, class A>
inline void Mov(D& d, A a) {
  Put(d, As<T>(a));
}
template <class T, class D, class A>
inline void Not(D& d, A a) {
  Put(d, static_cast<T>(~As<T>(a)));
}
template <class D, class A>
inline void NotPredicate(D& d, A a) {
  d = !a;
}
template <class T, class D, class A, class B, class C>
inline void Mad(D& d, A a, B b, C c) {
  Put(d, static_cast<T>(As<T>(a) * As<T>(b) + As<T>(c)));
}
template <class D, class A, class B, class C>
inline void Fma(D& d, A a, B b, C c) {
  Put(d, fmaf(As<float>(a), As<float>(b), As<float>(c)));
}
template <class T, class D, class A, class B, class P>
inline void Selp(D& d, A a, B b, P p) {
  Put(d, p ? As<T>(a) : As<T>(b));
}
#define MOEGEN_COMPARE(name, op)                          \
  template <class T, class P, class A, class B>           \
  inline void Setp##name(P& p, A a, B b) {                \
    Put(p, As<T>(a) op As<T>(b));                         \
  }
MOEGEN_COMPARE(Eq, ==)
MOEGEN_COMPARE(Ne, !=)
MOEGEN_COMPARE(Lt, <)
MOEGEN_COMPARE(Le, <=)
MOEGEN_COMPARE(Gt, >)
MOEGEN_COMPARE(Ge, >=)
#undef MOEGEN_COMPARE

// Approximations of the device are good to about one unit in the 22nd bit; these are better.
#define MOEGEN_UNARY(name, expression)      \
  template <class D, class A>               \
  inline void name(D& d, A first) {         \
    float a = As<float>(first);             \
    Put(d, static_cast<float>(expression)); \
  }
MOEGEN_UNARY(Ex2, exp2f(a))
MOEGEN_UNARY(Lg2, log2f(a))
MOEGEN_UNARY(Rcp, 1.0f / a)
MOEGEN_UNARY(Sqrt, sqrtf(a))
MOEGEN_UNARY(Rsqrt, 1.0f / sqrtf(a))
MOEGEN_UNARY(Tanh, tanhf(a))
MOEGEN_UNARY(Neg, -a)
MOEGEN_UNARY(Abs, fabsf(a))
#undef MOEGEN_UNARY

// ---------------------------------------------------------------- conversions

template <class D, class A>
inline void CvtTensorFloat(D& d, A a) {
  Put(d, RoundedTensorFloat(As<float>(a)));
}
template <class To, class From, class D, class A>
inline void CvtInteger(D& d, A a) {
  Put(d, static_cast<To>(As<From>(a)));
}
template <class Format, class D, class A>
inline void CvtNarrow(D& d, A a) {
  Put(d, Format::Narrow(As<float>(a)));
}
template <class Format, class D, class A>
inline void CvtWiden(D& d, A a) {
  Put(d, Format::Widen(As<uint16_t>(a)));
}
template <class Format, class D, class A, class B>  // the first operand becomes the upper half
inline void CvtNarrowPair(D& d, A high, B low) {
  Put(d, static_cast<uint32_t>(Format::Narrow(As<float>(high))) << 16 | Format::Narrow(As<float>(low)));
}
template <class D, class A>
inline void ToShared(D& d, A generic) {
  Put(d, SharedAddress(reinterpret_cast<const void*>(As<uint64_t>(generic))));
}
template <class D, class A>
inline void ToGlobal(D& d, A generic) {
  Put(d, As<uint64_t>(generic));
}

// ---------------------------------------------------------------- memory

template <class A>
inline void* GlobalPointer(A address) {
  return reinterpret_cast<void*>(As<uint64_t>(address));
}
void CheckAligned(const void* pointer, size_t bytes, const char* instruction);

template <class T>
inline void TakeEach(const T*) {}
template <class T, class D, class... Others>
inline void TakeEach(const T* from, D& d, Others&... others) {
  Put(d, *from);
  TakeEach(from + 1, others...);
}
// ld.global: the address comes last.
template <class T, class A, class... D>
inline void LoadGlobal(A address, D&... d) {
  T values[sizeof...(D)];
  CheckAligned(GlobalPointer(address), sizeof values, "ld.global");
  memcpy(values, GlobalPointer(address), sizeof values);
  TakeEach(values, d...);
}
template <class T, class A, class... D>
inline void LoadShared(A address, D&... d) {
  T values[sizeof...(D)];
  memcpy(values, SharedPointer(As<uint32_t>(address), sizeof values, sizeof values, "ld.shared"), sizeof values);
  TakeEach(values, d...);
}
template <class T, class A, class... S>
inline void StoreGlobal(A address, S... s) {
  T values[] = {As<T>(s)...};
  CheckAligned(GlobalPointer(address), sizeof values, "st.global");
  memcpy(GlobalPointer(address), values, sizeof values);
}
template <class T, class A, class... S>
inline void StoreShared(A address, S... s) {
  T values[] = {As<T>(s)...};
  memcpy(SharedPointer(As<uint32_t>(address), sizeof values, sizeof values, "st.shared"), values, sizeof values);
}
template <class T, class A, class S>
inline void RedGlobalAdd(A address, S s) {
  atomicAdd(static_cast<T*>(GlobalPointer(address)), As<T>(s));
}
template <class T, class A, class D, class S>
inline void AtomGlobalAdd(D& d, A address, S s) {
  Put(d, atomicAdd(static_cast<T*>(GlobalPointer(address)), As<T>(s)));
}

// ---------------------------------------------------------------- cp.async

void IssueCopy(uint32_t to, const void* from, uint32_t bytes, uint32_t read);
template <class D, class S, class N>
inline void CpAsync(D to, S from, N bytes) {
  IssueCopy(As<uint32_t>(to), GlobalPointer(from), static_cast<uint32_t>(bytes), static_cast<uint32_t>(bytes));
}
template <class D, class S, class N, class R>
inline void CpAsync(D to, S from, N bytes, R read) {
  IssueCopy(As<uint32_t>(to), GlobalPointer(from), static_cast<uint32_t>(bytes), static_cast<uint32_t>(read));
}
void CpAsyncCommitGroup();
void CpAsyncWaitGroup(unsigned left);
void CpAsyncWaitAll();

// ---------------------------------------------------------------- matrices

void LoadMatrix(unsigned matrices, bool transposed, uint32_t address, uint32_t* registers);
template <bool transposed, class A, class... D>
inline void LdMatrix(A address, D&... d) {
  uint32_t registers[sizeof...(D)];
  LoadMatrix(sizeof...(D), transposed, As<uint32_t>(address), registers);
  TakeEach(registers, d...);
}
void StoreMatrix(unsigned matrices, bool transposed, uint32_t address, const uint32_t* registers);
template <bool transposed, class A, class... S>
inline void StMatrix(A address, S... s) {
  const uint32_t registers[] = {As<uint32_t>(s)...};
  StoreMatrix(sizeof...(S), transposed, As<uint32_t>(address), registers);
}

enum class Element { kHalf, kBFloat, kTensorFloat };

// d = a b + c for the warp's 16 x 8 tile and `depth` terms; registers are the lane's own.
void Multiply(Element element, unsigned depth, const uint32_t* a, const uint32_t* b, const float* c, float* d);

template <Element element, unsigned depth, class D, class A, class B, class C>
inline void Mma(D& d0, D& d1, D& d2, D& d3, A a0, A a1, A a2, A a3, B b0, B b1, C c0, C c1, C c2, C c3) {
  const uint32_t a[] = {As<uint32_t>(a0), As<uint32_t>(a1), As<uint32_t>(a2), As<uint32_t>(a3)};
  const uint32_t b[] = {As<uint32_t>(b0), As<uint32_t>(b1)};
  const float c[] = {As<float>(c0), As<float>(c1), As<float>(c2), As<float>(c3)};
  float d[4];
  Multiply(element, depth, a, b, c, d);
  TakeEach(d, d0, d1, d2, d3);
}
template <Element element, unsigned depth, class D, class A, class B, class C>
inline void Mma(D& d0, D& d1, D& d2, D& d3, A a0, A a1, B b0, C c0, C c1, C c2, C c3) {
  const uint32_t a[] = {As<uint32_t>(a0), As<uint32_t>(a1)};
  const uint32_t b[] = {As<uint32_t>(b0)};
  const float c[] = {As<float>(c0), As<float>(c1), As<float>(c2), As<float>(c3)};
  float d[4];
  Multiply(element, depth, a, b, c, d);
  TakeEach(d, d0, d1, d2, d3);
}

// ---------------------------------------------------------------- barriers

template <class I>
inline void BarSync(I id) {
  Synchronize(static_cast<unsigned>(id), 0, 0);
}
template <class I, class N>
inline void BarSync(I id, N threads) {
  Synchronize(static_cast<unsigned>(id), static_cast<unsigned>(threads), 0);
}
template <class I, class N>
inline void BarArrive(I id, N threads) {
  Synchronize(static_cast<unsigned>(id), static_cast<unsigned>(threads), 0, false);
}
template <class M>
inline void BarWarpSync(M mask) {
  SynchronizeWarp(static_cast<uint32_t>(mask));
}

// Orders memory, or tells caches: nothing to do where every access is in order.
template <class... Any>
inline void Nothing(Any...) {
  asm volatile("" ::: "memory");
}
template <class D>
inline void CreatePolicy(D& d) {
  Put(d, uint64_t{0});
}
[[noreturn]] inline void Trap() { Fail("trap"); }

}  // namespace emulator::ptx
