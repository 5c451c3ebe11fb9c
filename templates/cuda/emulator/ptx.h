// PTX instructions, one function each: moegen/cuda/ptx.py turns asm statements into calls of these.
//
// Registers are C++ variables, whose type need not be the instruction's: `As` reads one as another type of the same size, `Put`
// writes one.
#pragma once
#include <type_traits>

#include "intrinsics.h"

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

#define MOEGEN_BINARY(name, expression)         \
  template <class T, class D, class A, class B> \
  inline void name(D& d, A first, B second) {   \
    T a = As<T>(first), b = As<T>(second);      \
    Put(d, static_cast<T>(expression));         \
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
#define MOEGEN_COMPARE(name, op)                \
  template <class T, class P, class A, class B> \
  inline void Setp##name(P& p, A a, B b) {      \
    Put(p, As<T>(a) op As<T>(b));               \
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
void DeliverCopies(Copies* copies, uint64_t until);
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

// wgmma.mma_async: the warpgroup's 64 x N tile of float32; its registers change when wgmma.wait_group says so.
struct Wgmma {
  Element element;
  float* const* d;    // N / 2 registers of this thread
  unsigned columns;   // N
  const uint32_t* a;  // four registers of this thread, or null
  uint64_t a_descriptor, b_descriptor;
  bool accumulate;       // false: what d held is forgotten
  int scale_a, scale_b;  // 1 or -1
  bool a_transposed, b_transposed;
};
void IssueWgmma(const Wgmma& wgmma);
void WgmmaFence();
void WgmmaCommitGroup();
void WgmmaWaitGroup(unsigned left);

template <Element element, unsigned registers, class A, class B, class P>
inline void WgmmaShared(float* const (&d)[registers], A a, B b, P accumulate, int scale_a, int scale_b, int a_trans = 0,
                        int b_trans = 0) {
  IssueWgmma({element, d, registers * 2, nullptr, As<uint64_t>(a), As<uint64_t>(b), accumulate != 0, scale_a, scale_b, a_trans != 0,
              b_trans != 0});
}
template <Element element, unsigned registers, class B, class P>
inline void WgmmaRegisters(float* const (&d)[registers], const uint32_t (&a)[4], B b, P accumulate, int scale_a, int scale_b,
                           int b_trans = 0) {
  IssueWgmma({element, d, registers * 2, a, 0, As<uint64_t>(b), accumulate != 0, scale_a, scale_b, false, b_trans != 0});
}

// ---------------------------------------------------------------- mbarriers and bulk copies

void MbarrierInit(uint32_t address, uint32_t count);
void MbarrierInval(uint32_t address);
uint64_t MbarrierArrive(uint32_t address, uint32_t count, uint32_t bytes);
void MbarrierExpect(uint32_t address, uint32_t bytes);
bool MbarrierTest(uint32_t address, uint32_t parity);
void MbarrierWait(uint32_t address, uint32_t parity);
void IssueTensorCopy(uint32_t to, const void* map, const int32_t* coordinates, unsigned rank, uint32_t barrier);
void IssueBulkCopy(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier);
void CpAsyncArrive(uint32_t barrier, bool counted);

template <class D>
inline void Arrive(D& token, uint32_t address, uint32_t count = 1) {
  Put(token, MbarrierArrive(address, count, 0));
}
template <class D>
inline void ArriveExpect(D& token, uint32_t address, uint32_t bytes) {
  Put(token, MbarrierArrive(address, 1, bytes));
}
// The token of an arrival is the parity of its phase, so that waiting for either is the same.
template <class P, class T>
inline void TestWait(P& done, uint32_t address, T parity) {
  Put(done, MbarrierTest(address, static_cast<uint32_t>(parity)));
}
template <class P, class T>
inline void TryWait(P& done, uint32_t address, T parity, uint32_t = 0) {
  MbarrierWait(address, static_cast<uint32_t>(parity));
  Put(done, true);
}
template <class M, class... C>
inline void TensorCopyWith(uint32_t to, M map, uint32_t barrier, C... coordinates) {
  const int32_t at[] = {As<int32_t>(coordinates)...};
  IssueTensorCopy(to, GlobalPointer(map), at, sizeof...(C), barrier);
}
template <class T, class M, class C0, class B>
inline void TensorCopy1(T to, M map, C0 c0, B barrier) {
  TensorCopyWith(to, map, barrier, c0);
}
template <class T, class M, class C, class B>
inline void TensorCopy2(T to, M map, C c0, C c1, B barrier) {
  TensorCopyWith(to, map, barrier, c0, c1);
}
template <class T, class M, class C, class B>
inline void TensorCopy3(T to, M map, C c0, C c1, C c2, B barrier) {
  TensorCopyWith(to, map, barrier, c0, c1, c2);
}
template <class F>
inline void BulkCopy(uint32_t to, F from, uint32_t bytes, uint32_t barrier) {
  IssueBulkCopy(to, GlobalPointer(from), bytes, barrier);
}
inline void CpAsyncArriveNoInc(uint32_t barrier) { CpAsyncArrive(barrier, true); }
inline void CpAsyncArriveInc(uint32_t barrier) { CpAsyncArrive(barrier, false); }

template <class D, class P>
inline void Elect(D& leader, P& mine, uint32_t mask) {
  SynchronizeWarp(mask);
  uint32_t first = static_cast<uint32_t>(__builtin_ctz(mask & ActiveMask()));
  Put(leader, first);
  Put(mine, current->lane == first);
}
inline void SetMaxRegisters(uint32_t count) {
  if (count % 8 != 0 || count < 24 || count > 256)
    Fail("setmaxnreg: %u registers, it has to be a multiple of 8 from 24 to 256", count);
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
// A cluster has one block: its barrier waits for the block's own threads.
inline void ClusterWait() { Synchronize(kClusterBarrier, 0, 0); }
template <class D, class A, class R>
inline void MapRank(D& d, A address, R rank) {
  if (As<uint32_t>(rank) != 0) Fail("mapa: clusters have one block here, this is for number %u", As<uint32_t>(rank));
  Put(d, As<uint32_t>(address));
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
template <class D, class... Fraction>
inline void CreatePolicy(D& d, Fraction...) {
  Put(d, uint64_t{0});
}
template <class T>
inline void Sleep(T) {
  Yield();
}
[[noreturn]] inline void Trap() { Fail("trap"); }

}  // namespace emulator::ptx
