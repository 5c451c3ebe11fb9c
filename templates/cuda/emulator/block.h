// A block that runs: its fibers, and which of them goes on next. Only the runtime sees this.
#pragma once
#include <string>
#include <utility>
#include <vector>

#include "runtime.h"
#include "tensor_map.h"

namespace emulator {

enum class Order { kAscending, kDescending, kShuffled };

// xorshift64*: which fiber goes next has to be the same for the same seed everywhere.
class Random {
 public:
  explicit Random(uint64_t seed = 0) : state_(seed * 0x9e3779b97f4a7c15u | 1) {}
  uint32_t operator()(uint32_t below) {
    state_ ^= state_ >> 12;
    state_ ^= state_ << 25;
    state_ ^= state_ >> 27;
    return static_cast<uint32_t>((state_ * 0x2545f4914f6cdd1du >> 32) * below >> 32);
  }

 private:
  uint64_t state_;
};

// Work that the device does beside its threads.
struct Event {
  void (*deliver)(const Event& event);
  const char* name;  // of copies that must have arrived when the block ends, otherwise null
  Fiber* fiber;      // that asked for it
  uint32_t to, barrier, bytes;
  const void* from;
  uint64_t until;  // the fiber's copies before this number
  TensorMap map;
  int32_t coordinates[5];
};

namespace ptx {
struct Products;  // wgmma.cc
void Free(Products* products);
}  // namespace ptx

// A warpgroup: what its threads do together, and its products under way.
struct Group {
  unsigned arrived = 0;
  const Operation* operation = nullptr;
  void* operands[kGroup];
  ptx::Products* products = nullptr;
};

struct Block {
  const Kernel* kernel = nullptr;
  void* const* arguments = nullptr;
  Place place{};

  unsigned threads = 0, warps = 0, live = 0;
  Warp warp[kMaxThreads / kWarp];
  Barrier barrier[kBarriers];
  Group group[kMaxThreads / kGroup];
  std::vector<std::pair<uint32_t, Fiber*>> waiting_at;  // addresses of shared memory
  std::vector<Event> events;
  std::vector<Fiber> fibers;
  Order order = Order::kAscending;
  Random random;
  uint64_t spins = 0;  // yields since anything happened

  char* arena = nullptr;
  uint32_t arena_bytes = 0, dynamic_at = 0;
  char* stacks = nullptr;
  size_t stack_stride = 0;

  Context base;  // of the worker
  bool failed = false;
  std::string message;
  const void* fault = nullptr;  // the address of an access that was refused
};

// Runs the block whose fields have been set, until all of its threads have ended or one of them has failed.
void Run(Block* block);

// Has something done later.
void Begin(Event event);

// Ends the fiber that runs, with the message of a failure. Also called from the handler of signals.
[[noreturn]] void Abandon(const std::string& message);

}  // namespace emulator
