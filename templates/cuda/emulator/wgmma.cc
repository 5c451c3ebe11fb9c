// wgmma: products of a warpgroup, whose operands lie in shared memory and whose results appear late.
//
// A product is computed when all 128 threads have asked for it. Its registers hold NaN from then to the wgmma.wait_group that
// covers it, and its operands are compared, when every warp has waited, with what they were: whoever changes them before is told.
// Sums are fused multiply-adds in float32, by ascending k; the device's last bits differ.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "block.h"
#include "ptx.h"

namespace emulator::ptx {
namespace {

constexpr unsigned kRows = 64, kMaxColumns = 256, kWarps = kGroup / kWarp;
constexpr unsigned kDepthBytes = 32;  // of k in one instruction: 16 elements of 16 bits, 8 of 32

// ---------------------------------------------------------------- matrices in shared memory

// What a 64-bit matrix descriptor says. Names as in the PTX manual, in bytes.
struct Descriptor {
  explicit Descriptor(uint64_t bits)
      : start(static_cast<uint32_t>(bits & 0x3fff) << 4),
        leading(static_cast<uint32_t>(bits >> 16 & 0x3fff) << 4),
        stride(static_cast<uint32_t>(bits >> 32 & 0x3fff) << 4),
        swizzle(static_cast<unsigned>((4 - (bits >> 62)) & 3)) {
    if ((bits >> 49 & 7) != 0) Fail("wgmma: base offsets of matrix descriptors are not emulated");
  }
  uint32_t start, leading, stride;
  unsigned swizzle;  // log2 of its 16-byte chunks: 3 for 128 bytes
};

// The address of the 16 bytes with element (row, k) at their beginning. `row` is of M or N and `k` of the depth, in elements;
// `across` elements fit in 16 bytes. K-major: 8 rows of a core matrix are `16 << swizzle` bytes apart, groups of 8 rows `stride`.
// Transposed (M or N major): 16-byte chunks hold rows of one k, groups of `across << swizzle` rows are `leading` bytes apart.
uint32_t ChunkAddress(const Descriptor& d, unsigned row, unsigned k, bool transposed, unsigned across) {
  uint32_t at = d.start;
  if (!transposed) {
    at += row / 8 * d.stride + row % 8 * (16u << d.swizzle);
    at += d.swizzle == 0 ? k / across * d.leading : k / across * 16;
  } else if (d.swizzle == 0) {
    at += row / across * d.stride + k / 8 * d.leading + k % 8 * 16;
  } else {
    unsigned wide = across << d.swizzle;
    at += row / wide * d.leading + k / 8 * d.stride + k % 8 * (16u << d.swizzle) + row % wide / across * 16;
  }
  return Swizzled(at, d.swizzle);
}

// The matrix as [rows][32 bytes of k], elements in order.
void Gather(uint64_t bits, unsigned rows, bool transposed, unsigned element_bytes, unsigned char* out) {
  const Descriptor descriptor(bits);
  const unsigned across = 16 / element_bytes, depth = kDepthBytes / element_bytes;
  const unsigned row_step = transposed ? across : 1, k_step = transposed ? 1 : across;
  for (unsigned row = 0; row < rows; row += row_step) {
    for (unsigned k = 0; k < depth; k += k_step) {
      const char* chunk = SharedPointer(ChunkAddress(descriptor, row, k, transposed, across), 16, 16, "wgmma");
      if (!transposed) {
        std::memcpy(out + row * kDepthBytes + k * element_bytes, chunk, 16);
        continue;
      }
      for (unsigned i = 0; i < across; ++i) {
        std::memcpy(out + (row + i) * kDepthBytes + k * element_bytes, chunk + i * element_bytes, element_bytes);
      }
    }
  }
}

float Value(const unsigned char* at, Element element) {
  uint32_t wide = 0;
  std::memcpy(&wide, at, element == Element::kTensorFloat ? 4 : 2);
  if (element == Element::kHalf) return Half::Widen(static_cast<uint16_t>(wide));
  return element == Element::kBFloat ? BFloat::Widen(static_cast<uint16_t>(wide)) : TensorFloat(wide);
}

// ---------------------------------------------------------------- the product

struct Tile {
  alignas(64) float sums[kRows][kMaxColumns];
};

// Rows come from `a` [64][depth], columns from `b` [columns][depth].
void MultiplyAdd(const Wgmma& wgmma, const unsigned char* a, const unsigned char* b, Tile* tile) {
  const unsigned bytes = wgmma.element == Element::kTensorFloat ? 4 : 2, depth = kDepthBytes / bytes, columns = wgmma.columns;
  alignas(64) float right[kDepthBytes / 2][kMaxColumns];
  for (unsigned column = 0; column < columns; ++column) {
    for (unsigned k = 0; k < depth; ++k)
      right[k][column] = wgmma.scale_b * Value(b + column * kDepthBytes + k * bytes, wgmma.element);
  }
  for (unsigned row = 0; row < kRows; ++row) {
    float* sums = tile->sums[row];
    for (unsigned k = 0; k < depth; ++k) {
      const float left = wgmma.scale_a * Value(a + row * kDepthBytes + k * bytes, wgmma.element);
      for (unsigned column = 0; column < columns; ++column) sums[column] = std::fma(left, right[k][column], sums[column]);
    }
  }
}

// Fragments of A in registers: each warp has 16 rows, laid out as for mma.sync.
void GatherRegisters(const Wgmma* const* threads, unsigned char* out) {
  for (unsigned thread = 0; thread < kGroup; ++thread) {
    const unsigned lane = thread % kWarp;
    for (unsigned i = 0; i < 4; ++i) {
      const unsigned row = thread / kWarp * 16 + lane / 4 + i % 2 * 8;
      std::memcpy(out + row * kDepthBytes + lane % 4 * 4 + i / 2 * 16, &threads[thread]->a[i], 4);
    }
  }
}

// Row and column of a thread's register.
unsigned RowOf(unsigned thread, unsigned i) { return thread / kWarp * 16 + thread % kWarp / 4 + i / 2 % 2 * 8; }
unsigned ColumnOf(unsigned thread, unsigned i) { return i / 4 * 8 + thread % 4 * 2 + i % 2; }

}  // namespace

// ---------------------------------------------------------------- what is under way

struct Pending {
  unsigned columns = 0;
  std::vector<float*> registers[kGroup];
  uint64_t group[kWarps] = {};  // the group of each warp in which the last product with these registers is
  bool visible[kWarps] = {};    // to this warp
  Tile tile;
};

struct Reading {
  Wgmma wgmma;
  uint64_t group[kWarps] = {};
  bool waited[kWarps] = {};
  std::vector<unsigned char> a, b;
};

struct Products {
  std::vector<std::unique_ptr<Pending>> pending;
  std::vector<Reading> reading;
  uint64_t groups[kWarps] = {};  // that each warp has committed
  bool fenced[kWarps] = {};
};

void Free(Products* products) { delete products; }

namespace {

Products& Mine() {
  Block* block = current->block;
  Products*& products = block->group[current->index / kGroup].products;
  if (products == nullptr) products = new Products;
  return *products;
}

unsigned WarpOfGroup() { return current->index / kWarp % kWarps; }

Pending* PendingOf(Products* products, const Wgmma* const* threads) {
  for (auto& known : products->pending) {
    if (known->registers[0][0] != threads[0]->d[0]) continue;
    if (known->columns != threads[0]->columns) Fail("wgmma: registers of a product of another shape, which is still under way");
    return known.get();
  }
  products->pending.push_back(std::make_unique<Pending>());
  Pending* made = products->pending.back().get();
  made->columns = threads[0]->columns;
  for (unsigned thread = 0; thread < kGroup; ++thread) {
    made->registers[thread].assign(threads[thread]->d, threads[thread]->d + made->columns / 2);
  }
  std::fill(std::begin(made->visible), std::end(made->visible), true);
  return made;
}

// Takes what the registers hold, unless it is on its way there, and leaves NaN.
void Hide(Pending* pending, bool accumulate) {
  if (!accumulate) std::memset(&pending->tile, 0, sizeof pending->tile);
  for (unsigned thread = 0; thread < kGroup; ++thread) {
    if (!pending->visible[thread / kWarp]) continue;
    for (unsigned i = 0; i < pending->columns / 2; ++i) {
      float* at = pending->registers[thread][i];
      if (accumulate) pending->tile.sums[RowOf(thread, i)][ColumnOf(thread, i)] = *at;
      std::memset(at, kPoison, sizeof *at);
    }
  }
  std::fill(std::begin(pending->visible), std::end(pending->visible), false);
}

void PerformWgmma(void* const* operands, uint32_t) {
  auto* threads = reinterpret_cast<const Wgmma* const*>(operands);
  const Wgmma& wgmma = *threads[0];
  for (unsigned thread = 1; thread < kGroup; ++thread) {
    const Wgmma& other = *threads[thread];
    if (other.a_descriptor != wgmma.a_descriptor || other.b_descriptor != wgmma.b_descriptor ||
        other.accumulate != wgmma.accumulate) {
      Fail("wgmma: thread %u of the warpgroup has other descriptors than its first thread", thread);
    }
  }
  Products& products = Mine();
  const unsigned bytes = wgmma.element == Element::kTensorFloat ? 4 : 2;
  Reading reading{
      wgmma, {}, {}, std::vector<unsigned char>(kRows * kDepthBytes), std::vector<unsigned char>(wgmma.columns * kDepthBytes)};
  if (wgmma.a == nullptr) {
    Gather(wgmma.a_descriptor, kRows, wgmma.a_transposed, bytes, reading.a.data());
  } else {
    GatherRegisters(threads, reading.a.data());
  }
  Gather(wgmma.b_descriptor, wgmma.columns, wgmma.b_transposed, bytes, reading.b.data());
  Pending* pending = PendingOf(&products, threads);
  Hide(pending, wgmma.accumulate);
  MultiplyAdd(wgmma, reading.a.data(), reading.b.data(), &pending->tile);
  std::copy(std::begin(products.groups), std::end(products.groups), pending->group);
  std::copy(std::begin(products.groups), std::end(products.groups), reading.group);
  products.reading.push_back(std::move(reading));
}

const Operation kWgmma{"wgmma.mma_async", PerformWgmma, true};

void Publish(Pending* pending, unsigned warp) {
  for (unsigned thread = warp * kWarp; thread < (warp + 1) * kWarp; ++thread) {
    for (unsigned i = 0; i < pending->columns / 2; ++i)
      *pending->registers[thread][i] = pending->tile.sums[RowOf(thread, i)][ColumnOf(thread, i)];
  }
  pending->visible[warp] = true;
}

void CheckUnchanged(const Reading& reading) {
  const Wgmma& wgmma = reading.wgmma;
  const unsigned bytes = wgmma.element == Element::kTensorFloat ? 4 : 2;
  std::vector<unsigned char> now(std::max(reading.a.size(), reading.b.size()));
  for (bool left : {true, false}) {
    if (left && wgmma.a != nullptr) continue;
    const std::vector<unsigned char>& then = left ? reading.a : reading.b;
    Gather(left ? wgmma.a_descriptor : wgmma.b_descriptor, left ? kRows : wgmma.columns,
           left ? wgmma.a_transposed : wgmma.b_transposed, bytes, now.data());
    if (std::memcmp(now.data(), then.data(), then.size()) != 0) {
      Fail("wgmma: operand %c in shared memory has been changed before wgmma.wait_group", left ? 'A' : 'B');
    }
  }
}

bool All(const bool (&flags)[kWarps]) {
  return std::all_of(std::begin(flags), std::end(flags), [](bool flag) { return flag; });
}

void Wait(unsigned left) {
  Products& products = Mine();
  const unsigned warp = WarpOfGroup();
  const uint64_t committed = products.groups[warp];
  auto done = [&](uint64_t group) { return group < committed && committed - group > left; };
  for (auto& pending : products.pending) {
    if (!pending->visible[warp] && done(pending->group[warp])) Publish(pending.get(), warp);
  }
  for (Reading& reading : products.reading) {
    if (reading.waited[warp] || !done(reading.group[warp])) continue;
    reading.waited[warp] = true;
    if (All(reading.waited)) CheckUnchanged(reading);
  }
  products.reading.erase(
      std::remove_if(products.reading.begin(), products.reading.end(), [](const Reading& reading) { return All(reading.waited); }),
      products.reading.end());
  products.pending.erase(
      std::remove_if(products.pending.begin(), products.pending.end(), [](const auto& pending) { return All(pending->visible); }),
      products.pending.end());
}

void PerformWait(void* const* operands, uint32_t) { Wait(*static_cast<const unsigned*>(operands[0])); }

const Operation kWait{"wgmma.wait_group", PerformWait, true};
const Operation kCommit{"wgmma.commit_group", [](void* const*, uint32_t) { ++Mine().groups[WarpOfGroup()]; }, true};
const Operation kFence{"wgmma.fence", [](void* const*, uint32_t) { Mine().fenced[WarpOfGroup()] = true; }, true};

}  // namespace

void IssueWgmma(const Wgmma& wgmma) {
  if (!Mine().fenced[WarpOfGroup()]) Fail("wgmma.mma_async without a wgmma.fence before it");
  if (wgmma.columns % 8 != 0 || wgmma.columns > kMaxColumns)
    Fail("wgmma: N is %u, it has to be a multiple of 8 up to 256", wgmma.columns);
  Wgmma mine = wgmma;
  MeetGroup(kWgmma, &mine);
}
void WgmmaFence() { Meet(kAllLanes, kFence, nullptr); }
void WgmmaCommitGroup() { Meet(kAllLanes, kCommit, nullptr); }
void WgmmaWaitGroup(unsigned left) { Meet(kAllLanes, kWait, &left); }

}  // namespace emulator::ptx
