// mbarriers, and what the device does beside its threads: tensor copies and arrivals of asynchronous copies.
//
// Such work is done as late as it can be: when no thread of the block can go on (with `shuffled`, sometimes before). Until then its
// destination holds poison.
#include <algorithm>
#include <cstring>

#include "block.h"
#include "ptx.h"

namespace emulator {
namespace {

// What the 8 bytes of an mbarrier hold. Poison is none: its mark would be 3.
struct State {
  uint64_t expected : 20, pending : 20, phase : 1;
  int64_t bytes : 21;  // still to come; negative when they came before they were expected
  uint64_t mark : 2;
};
static_assert(sizeof(State) == 8);

State* BarrierAt(uint32_t address, const char* instruction) {
  auto* state = reinterpret_cast<State*>(SharedPointer(address, 8, 8, instruction));
  if (state->mark != 1) Fail("%s: there is no mbarrier at address 0x%x of shared memory", instruction, address);
  return state;
}

void CompletePhase(State* state, uint32_t address) {
  if (state->pending != 0 || state->bytes != 0) return;
  state->phase ^= 1;
  state->pending = state->expected;
  WakeAt(address);
}

void ArriveAt(uint32_t address, uint32_t count, const char* instruction) {
  State* state = BarrierAt(address, instruction);
  if (state->pending < count) {
    Fail("%s: %u arrive at the mbarrier at 0x%x, which waits for %u more in this phase", instruction, count, address,
         static_cast<unsigned>(state->pending));
  }
  state->pending -= count;
  CompletePhase(state, address);
}

void CompleteBytes(uint32_t address, uint32_t bytes, const char* instruction) {
  State* state = BarrierAt(address, instruction);
  state->bytes -= bytes;
  CompletePhase(state, address);
}

// ---------------------------------------------------------------- tensor copies

const char* const kTensorCopy = "cp.async.bulk.tensor";
const char* const kBulkCopy = "cp.async.bulk";

uint32_t BoxBytes(const TensorMap& map) {
  uint32_t bytes = map.element_bytes;
  for (unsigned d = 0; d < map.rank; ++d) bytes *= map.box[d];
  return bytes;
}

// Copies one row of the box, which begins at `index` in the tensor; what is outside of the tensor is zero (or NaN).
void CopyRow(const TensorMap& map, const int64_t (&index)[5], uint32_t to) {
  uint32_t row = map.box[0] * map.element_bytes;
  std::vector<char> bytes(row, static_cast<char>(map.fill_with_nan ? kPoison : 0));
  bool inside = true;
  uint64_t from = map.address;
  for (unsigned d = 1; d < map.rank; ++d) {
    inside = inside && index[d] >= 0 && index[d] <= map.last[d];
    from += static_cast<uint64_t>(index[d]) * map.stride[d - 1];
  }
  int64_t begin = std::max<int64_t>(index[0], 0), end = std::min<int64_t>(index[0] + map.box[0], int64_t{map.last[0]} + 1);
  if (inside && begin < end) {
    std::memcpy(&bytes[static_cast<size_t>(begin - index[0]) * map.element_bytes],
                reinterpret_cast<const char*>(from + static_cast<uint64_t>(begin) * map.element_bytes),
                static_cast<size_t>(end - begin) * map.element_bytes);
  }
  for (uint32_t at = 0; at < row; at += 16) {
    std::memcpy(SharedPointer(Swizzled(to + at, map.swizzle), 16, 16, kTensorCopy), &bytes[at], 16);
  }
}

void DeliverTensor(const Event& event) {
  const TensorMap& map = event.map;
  uint32_t row = map.box[0] * map.element_bytes, rows = BoxBytes(map) / row;
  for (uint32_t i = 0; i < rows; ++i) {
    int64_t index[5] = {event.coordinates[0]};
    uint32_t rest = i;
    for (unsigned d = 1; d < map.rank; ++d) {
      index[d] = event.coordinates[d] + static_cast<int64_t>(rest % map.box[d]);
      rest /= map.box[d];
    }
    CopyRow(map, index, event.to + i * row);
  }
  CompleteBytes(event.barrier, BoxBytes(map), kTensorCopy);
}

void DeliverBulk(const Event& event) {
  std::memcpy(SharedPointer(event.to, event.bytes, 16, kBulkCopy), event.from, event.bytes);
  CompleteBytes(event.barrier, event.bytes, kBulkCopy);
}

void DeliverArrival(const Event& event) {
  ptx::DeliverCopies(&event.fiber->copies, event.until);
  ArriveAt(event.barrier, 1, "cp.async.mbarrier.arrive");
}

}  // namespace

namespace ptx {

void MbarrierInit(uint32_t address, uint32_t count) {
  if (count == 0 || count >= 1u << 20) Fail("mbarrier.init: the count is %u, it has to be 1 to 2^20 - 1", count);
  State state{};
  state.expected = state.pending = count;
  state.mark = 1;
  std::memcpy(SharedPointer(address, 8, 8, "mbarrier.init"), &state, sizeof state);
}

void MbarrierInval(uint32_t address) {
  BarrierAt(address, "mbarrier.inval");
  std::memset(SharedPointer(address, 8, 8, "mbarrier.inval"), kPoison, 8);
}

uint64_t MbarrierArrive(uint32_t address, uint32_t count, uint32_t bytes) {
  State* state = BarrierAt(address, "mbarrier.arrive");
  uint64_t before = state->phase;
  state->bytes += bytes;
  ArriveAt(address, count, "mbarrier.arrive");
  return before;
}

void MbarrierExpect(uint32_t address, uint32_t bytes) { BarrierAt(address, "mbarrier.expect_tx")->bytes += bytes; }

bool MbarrierTest(uint32_t address, uint32_t parity) {
  bool done = BarrierAt(address, "mbarrier.test_wait")->phase != (parity & 1);
  if (!done) Yield();
  return done;
}

void MbarrierWait(uint32_t address, uint32_t parity) {
  while (BarrierAt(address, "mbarrier.try_wait")->phase == (parity & 1)) WaitAt(address, "an mbarrier at address");
}

void IssueTensorCopy(uint32_t to, const void* map, const int32_t* coordinates, unsigned rank, uint32_t barrier) {
  Event event{};
  std::memcpy(&event.map, map, sizeof event.map);
  if (event.map.mark != kTensorMapMark) Fail("%s: %p is no tensor map that cuTensorMapEncodeTiled has made", kTensorCopy, map);
  if (reinterpret_cast<uintptr_t>(map) % 64 != 0) Fail("%s: the tensor map's address %p is not a multiple of 64", kTensorCopy, map);
  if (event.map.rank != rank) Fail("%s: %u coordinates for a tensor map of rank %u", kTensorCopy, rank, event.map.rank);
  uint32_t bytes = BoxBytes(event.map);
  if (event.map.swizzle != 0 && event.map.box[0] * event.map.element_bytes != 16u << event.map.swizzle) {
    Fail("%s: rows of a box that are shorter than the swizzle's are not emulated", kTensorCopy);
  }
  std::memset(SharedPointer(to, bytes, 128, kTensorCopy), kPoison, bytes);
  BarrierAt(barrier, kTensorCopy);
  event.deliver = DeliverTensor;
  event.name = kTensorCopy;
  event.to = to;
  event.barrier = barrier;
  for (unsigned d = 0; d < rank; ++d) event.coordinates[d] = coordinates[d];
  Begin(event);
}

void IssueBulkCopy(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  if (bytes % 16 != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0)
    Fail("%s: %u bytes from %p are not multiples of 16", kBulkCopy, bytes, from);
  std::memset(SharedPointer(to, bytes, 16, kBulkCopy), kPoison, bytes);
  BarrierAt(barrier, kBulkCopy);
  Event event{};
  event.deliver = DeliverBulk;
  event.name = kBulkCopy;
  event.to = to;
  event.barrier = barrier;
  event.from = from;
  event.bytes = bytes;
  Begin(event);
}

void CpAsyncArrive(uint32_t barrier, bool counted) {
  State* state = BarrierAt(barrier, "cp.async.mbarrier.arrive");
  if (!counted) ++state->pending;
  Event event{};
  event.deliver = DeliverArrival;
  event.barrier = barrier;
  event.until = current->copies.first + current->copies.issued.size();
  Begin(event);
}

}  // namespace ptx
}  // namespace emulator
