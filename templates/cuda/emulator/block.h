// A block that runs: its fibers, and which of them goes on next. Only the runtime sees this.
#pragma once
#include <string>
#include <vector>

#include "runtime.h"

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

struct Block {
  const Kernel* kernel = nullptr;
  void* const* arguments = nullptr;
  Place place{};

  unsigned threads = 0, warps = 0, live = 0;
  Warp warp[kMaxThreads / kWarp];
  Barrier barrier[kBarriers];
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

// Ends the fiber that runs, with the message of a failure. Also called from the handler of signals.
[[noreturn]] void Abandon(const std::string& message);

}  // namespace emulator
