// ldmatrix, stmatrix and mma.sync: what a warp does together with fragments of matrices.
//
// Fragments are laid out as the PTX manual has them: lane = 4 * group + thread. Sums are fused multiply-adds in float32, by
// ascending k, beginning with the accumulator. The device adds the products of a step more exactly and cuts the result off rather
// than rounding it, so that its last bits differ, by architecture as well.
#include <atomic>
#include <cmath>
#include <cstring>

#include "launch.h"
#include "ptx.h"

namespace emulator::ptx {
namespace {

constexpr unsigned kRows = 16, kColumns = 8, kMaxDepth = 16;

// ---------------------------------------------------------------- ldmatrix, stmatrix

// Rows of 16 bytes in banks that another of the eight has taken: the device reads or writes them later, one set of eight banks a time.
std::atomic<int64_t> conflicts{0};

void CountConflicts(char* const* rows) {
  unsigned taken = 0;
  for (unsigned row = 0; row < 8; ++row) taken |= 1u << reinterpret_cast<uintptr_t>(rows[row]) / 16 % 8;
  conflicts.fetch_add(8 - __builtin_popcount(taken), std::memory_order_relaxed);
}

struct MatrixAccess {
  uint32_t address;
  uint32_t registers[4];
};

// Register `matrix` of a lane is at row lane / 4, columns 2 * (lane % 4) and one more; transposed, at column and row.
template <unsigned matrices, bool transposed, bool store>
void PerformMatrix(void* const* operands, uint32_t) {
  auto lanes = reinterpret_cast<MatrixAccess* const*>(operands);
  for (unsigned matrix = 0; matrix < matrices; ++matrix) {
    char* rows[8];
    for (unsigned row = 0; row < 8; ++row) {
      rows[row] = SharedPointer(lanes[matrix * 8 + row]->address, 16, 16, store ? "stmatrix" : "ldmatrix");
    }
    CountConflicts(rows);
    for (unsigned lane = 0; lane < kWarp; ++lane) {
      uint32_t& mine = lanes[lane]->registers[matrix];
      const unsigned row = lane / 4, column = lane % 4 * 2;
      if constexpr (!transposed && store) {
        std::memcpy(rows[row] + 2 * column, &mine, 4);
      } else if constexpr (!transposed) {
        std::memcpy(&mine, rows[row] + 2 * column, 4);
      } else if constexpr (store) {
        std::memcpy(rows[column] + 2 * row, &mine, 2);
        std::memcpy(rows[column + 1] + 2 * row, reinterpret_cast<const char*>(&mine) + 2, 2);
      } else {
        uint16_t low, high;
        std::memcpy(&low, rows[column] + 2 * row, 2);
        std::memcpy(&high, rows[column + 1] + 2 * row, 2);
        mine = static_cast<uint32_t>(high) << 16 | low;
      }
    }
  }
}

template <unsigned matrices, bool transposed, bool store>
constexpr Operation kMatrix{store ? "stmatrix" : "ldmatrix", PerformMatrix<matrices, transposed, store>, true};

template <bool store>
const Operation& MatrixOperation(unsigned matrices, bool transposed) {
  if (matrices == 1) return transposed ? kMatrix<1, true, store> : kMatrix<1, false, store>;
  if (matrices == 2) return transposed ? kMatrix<2, true, store> : kMatrix<2, false, store>;
  return transposed ? kMatrix<4, true, store> : kMatrix<4, false, store>;
}

// ---------------------------------------------------------------- mma.sync

struct Fragments {
  const uint32_t *a, *b;
  const float* c;
  float* d;
};

template <class Format>
void Widen(uint32_t pair, float* to, unsigned stride) {
  to[0] = Format::Widen(static_cast<uint16_t>(pair));
  to[stride] = Format::Widen(static_cast<uint16_t>(pair >> 16));
}

// Registers of A cover rows (group, group + 8) and then the upper half of k; those of B cover the halves of k.
template <Element element, unsigned depth>
void Unpack(const Fragments& lane, unsigned group, unsigned thread, float a[kRows][kMaxDepth], float b[kMaxDepth][kColumns]) {
  constexpr unsigned kHalfDepth = element == Element::kTensorFloat ? 4 : 8;
  for (unsigned upper = 0; upper < depth / kHalfDepth; ++upper) {
    for (unsigned row = 0; row < 2; ++row) {
      uint32_t bits = lane.a[upper * 2 + row];
      float* to = &a[group + 8 * row][upper * kHalfDepth];
      if constexpr (element == Element::kTensorFloat) to[thread] = TensorFloat(bits);
      if constexpr (element == Element::kHalf) Widen<Half>(bits, to + 2 * thread, 1);
      if constexpr (element == Element::kBFloat) Widen<BFloat>(bits, to + 2 * thread, 1);
    }
    uint32_t bits = lane.b[upper];
    float (*to)[kColumns] = &b[upper * kHalfDepth];
    if constexpr (element == Element::kTensorFloat) to[thread][group] = TensorFloat(bits);
    if constexpr (element == Element::kHalf) Widen<Half>(bits, &to[2 * thread][group], kColumns);
    if constexpr (element == Element::kBFloat) Widen<BFloat>(bits, &to[2 * thread][group], kColumns);
  }
}

template <Element element, unsigned depth>
void PerformMultiply(void* const* operands, uint32_t) {
  alignas(64) float a[kRows][kMaxDepth], b[kMaxDepth][kColumns], c[kRows][kColumns];
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    const auto& mine = *static_cast<const Fragments*>(operands[lane]);
    unsigned group = lane / 4, thread = lane % 4;
    Unpack<element, depth>(mine, group, thread, a, b);
    for (unsigned i = 0; i < 4; ++i) c[group + 8 * (i / 2)][2 * thread + i % 2] = mine.c[i];
  }
  for (unsigned row = 0; row < kRows; ++row) {
    float sums[kColumns];
    std::memcpy(sums, c[row], sizeof sums);
    for (unsigned k = 0; k < depth; ++k) {
      for (unsigned column = 0; column < kColumns; ++column) sums[column] = std::fma(a[row][k], b[k][column], sums[column]);
    }
    std::memcpy(c[row], sums, sizeof sums);
  }
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    float* d = static_cast<const Fragments*>(operands[lane])->d;
    for (unsigned i = 0; i < 4; ++i) d[i] = c[lane / 4 + 8 * (i / 2)][lane % 4 * 2 + i % 2];
  }
}

template <Element element, unsigned depth>
constexpr Operation kMultiply{"mma.sync", PerformMultiply<element, depth>, true};

}  // namespace

void LoadMatrix(unsigned matrices, bool transposed, uint32_t address, uint32_t* registers) {
  MatrixAccess mine{address, {}};
  Meet(kAllLanes, MatrixOperation<false>(matrices, transposed), &mine);
  std::memcpy(registers, mine.registers, 4 * matrices);
}

void StoreMatrix(unsigned matrices, bool transposed, uint32_t address, const uint32_t* registers) {
  MatrixAccess mine{address, {}};
  std::memcpy(mine.registers, registers, 4 * matrices);
  Meet(kAllLanes, MatrixOperation<true>(matrices, transposed), &mine);
}

void Multiply(Element element, unsigned depth, const uint32_t* a, const uint32_t* b, const float* c, float* d) {
  Fragments mine{a, b, c, d};
  const Operation* operation = &kMultiply<Element::kTensorFloat, 8>;
  if (element == Element::kHalf) operation = depth == 16 ? &kMultiply<Element::kHalf, 16> : &kMultiply<Element::kHalf, 8>;
  if (element == Element::kBFloat) operation = depth == 16 ? &kMultiply<Element::kBFloat, 16> : &kMultiply<Element::kBFloat, 8>;
  if (element == Element::kTensorFloat && depth == 4) operation = &kMultiply<Element::kTensorFloat, 4>;
  Meet(kAllLanes, *operation, &mine);
}

}  // namespace emulator::ptx

extern "C" MOEGEN_EXPORT int64_t moegen_emulator_conflicts() { return emulator::ptx::conflicts.exchange(0); }
