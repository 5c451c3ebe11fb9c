// cp.async: copies that arrive late.
//
// From its issue to the wait that covers it a copy's destination is undefined: it holds poison. So a kernel that reads without
// having waited, or that lets a copy overwrite what others still read, gets NaN here instead of luck.
#include <cstring>

#include "ptx.h"

namespace emulator::ptx {
namespace {

// The source is read once when the copy is issued, so that a bad address is found where it was made.
void Touch(const void* from, uint32_t bytes) {
  if (bytes == 0) return;
  auto* at = static_cast<const volatile char*>(from);
  (void)at[0];
  (void)at[bytes - 1];
}

void Deliver(const Copy& copy) {
  char* to = SharedPointer(copy.to, copy.bytes, copy.bytes, "cp.async");
  std::memcpy(to, copy.from, copy.read);
  std::memset(to + copy.read, 0, copy.bytes - copy.read);
}

}  // namespace

void CheckAligned(const void* pointer, size_t bytes, const char* instruction) {
  if (reinterpret_cast<uintptr_t>(pointer) % bytes != 0)
    Fail("%s: address %p is not a multiple of %zu", instruction, pointer, bytes);
}

void IssueCopy(uint32_t to, const void* from, uint32_t bytes, uint32_t read) {
  if (bytes != 4 && bytes != 8 && bytes != 16) Fail("cp.async copies 4, 8 or 16 bytes, not %u", bytes);
  if (read > bytes) Fail("cp.async: it copies %u bytes and is to read %u", bytes, read);
  std::memset(SharedPointer(to, bytes, bytes, "cp.async"), kPoison, bytes);
  CheckAligned(from, bytes, "cp.async");
  Touch(from, read);
  current->copies.issued.push_back({to, bytes, read, from});
}

void DeliverCopies(Copies* copies, uint64_t until) {
  for (; copies->first < until && !copies->issued.empty(); ++copies->first) {
    Deliver(copies->issued.front());
    copies->issued.pop_front();
  }
}

void CpAsyncCommitGroup() { current->copies.groups.push_back(current->copies.first + current->copies.issued.size()); }

void CpAsyncWaitGroup(unsigned left) {
  Copies* copies = &current->copies;
  for (; copies->groups.size() > left; copies->groups.pop_front()) DeliverCopies(copies, copies->groups.front());
}

void CpAsyncWaitAll() {
  CpAsyncCommitGroup();
  CpAsyncWaitGroup(0);
}

}  // namespace emulator::ptx

namespace emulator {
namespace {

struct Voter {
  bool value;
  uint32_t result;
};

void PerformBallot(void* const* operands, uint32_t lanes) {
  uint32_t result = 0;
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if ((lanes >> lane & 1) && static_cast<Voter*>(operands[lane])->value) result |= 1u << lane;
  }
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if (lanes >> lane & 1) static_cast<Voter*>(operands[lane])->result = result;
  }
}

const Operation kBallot{"a warp vote", PerformBallot};
const Operation kSyncWarp{"__syncwarp", [](void* const*, uint32_t) {}};

}  // namespace

uint32_t Ballot(uint32_t mask, bool value) {
  Voter mine{value, 0};
  Meet(mask, kBallot, &mine);
  return mine.result;
}

void SynchronizeWarp(uint32_t mask) { Meet(mask, kSyncWarp, nullptr); }

}  // namespace emulator
