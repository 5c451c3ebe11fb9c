// What a running kernel knows of its place: threads, warps, the block, its shared memory, and how its threads wait for one another.
//
// Every device thread is a fiber. The fibers of a block share one thread of the processor and are never interrupted: a fiber
// runs until it waits for others. Blocks run one after another on each worker.
#pragma once
#include <cstdarg>
#include <cstddef>
#include <cstdint>
#include <deque>

#include "fiber.h"
#include "vectors.h"

namespace emulator {

constexpr unsigned kWarp = 32;
constexpr unsigned kGroup = 128;  // threads of a warpgroup
constexpr unsigned kMaxThreads = 1024;
constexpr unsigned kBarriers = 17;  // 16 with numbers and the cluster's
constexpr unsigned kClusterBarrier = 16;
constexpr uint32_t kAllLanes = 0xffffffffu;
constexpr uint32_t kSharedBase = 1024;        // the lowest address in the shared window: the device reserves the first KiB
constexpr uint32_t kSharedLimit = 227 << 10;  // bytes of shared memory that a block may have
constexpr int kPoison = 0xff;                 // NaN in every floating-point type, -1 in every integer

struct Block;
struct Warp;

// One 4, 8 or 16 byte copy of cp.async that has been issued and has not arrived.
struct Copy {
  uint32_t to;
  uint32_t bytes, read;  // the rest is filled with zeros
  const void* from;
};

struct Copies {
  std::deque<Copy> issued;      // those that have not arrived
  uint64_t first = 0;           // number of the first of them, counted from the thread's beginning
  std::deque<uint64_t> groups;  // number after the last copy of each committed group
};

// What a fiber waits for, for the message when it waits for ever.
struct Waiting {
  const char* what = nullptr;
  int detail = 0;
};

// What blockIdx, blockDim and gridDim are.
struct Place {
  uint3 block;
  dim3 size, grid;
};

struct Fiber {
  uint3 thread;  // threadIdx
  unsigned index = 0, lane = 0;
  const Place* place = nullptr;
  Block* block = nullptr;
  Warp* warp = nullptr;
  uint32_t result = 0;  // what a barrier with a reduction gave
  Waiting waiting;
  Context context;
  Copies copies;
};

// What the lanes of a warp do together: the last one to arrive does it for all of them.
// `operands` has the address that each lane gave; it lies on the lane's own stack, and results are written there.
struct Operation {
  const char* name;
  void (*perform)(void* const* operands, uint32_t lanes);
  bool aligned = false;  // defined only when all 32 lanes execute it
};

struct Meeting {
  uint32_t mask = 0;  // the lanes named, 0 when nothing is going on
  uint32_t arrived = 0;
  const Operation* operation = nullptr;
  void* operands[kWarp];
};

struct Warp {
  uint32_t ready = 0;  // lanes that run or could run
  uint32_t live = 0;   // lanes that have not ended
  unsigned meetings = 0;
  Meeting meeting[kWarp];  // more than one when lanes with disjoint masks have diverged
};

enum class Vote { kNone, kCount, kAnd, kOr };

struct Barrier {
  unsigned arrived = 0;
  unsigned expected = 0;  // 0: all threads of the block that have not ended
  int place = 0;          // source line of __syncthreads, 0 for bar.sync with a name
  Vote vote = Vote::kNone;
  unsigned trues = 0;
  uint32_t waiting[kMaxThreads / kWarp] = {};
};

extern __thread Fiber* current;  // the fiber that runs on this thread of the processor

// ---------------------------------------------------------------- waiting

// Ends the launch with a message that names kernel, block and thread.
[[noreturn]] void Fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Lets other fibers run; the caller stays ready.
void Yield();

// Waits until all lanes of `mask` that have not ended are at the same operation.
void Meet(uint32_t mask, const Operation& operation, void* operands);

// Waits until all 128 threads of a warpgroup are at the same operation.
void MeetGroup(const Operation& operation, void* operands);

// Waits until somebody calls WakeAt with the same address of shared memory, or for no reason.
void WaitAt(uint32_t address, const char* what);
void WakeAt(uint32_t address);

// bar.sync (`wait`) or bar.arrive on one of the 16 barriers; `threads` of them, 0 for the whole block.
uint32_t Synchronize(unsigned barrier, unsigned threads, int place, bool wait = true, Vote vote = Vote::kNone, bool value = false);

uint32_t ActiveMask();

// ---------------------------------------------------------------- shared memory

// Registers `bytes` of shared memory of one kernel (-1: of a device function); returns where they begin in the block's arena.
uint32_t ReserveShared(size_t bytes, size_t align, int kernel);
void AlignDynamicShared(size_t align);
char* SharedArena();
char* DynamicShared();

template <class Variables, int kernel>
struct SharedSlot {
  static const uint32_t offset;
};
template <class Variables, int kernel>
const uint32_t SharedSlot<Variables, kernel>::offset = ReserveShared(sizeof(Variables), alignof(Variables), kernel);

// `__shared__` variables: members of a struct made of their declarations.
template <class Variables, int kernel>
inline Variables& Shared() {
  return *reinterpret_cast<Variables*>(SharedArena() + SharedSlot<Variables, kernel>::offset);
}

template <size_t align>
struct DynamicAlignment {
  static const bool known;
};
template <size_t align>
const bool DynamicAlignment<align>::known = (AlignDynamicShared(align), true);

// `extern __shared__` arrays: all of them begin where the static variables end.
template <class Array, size_t align>
inline Array& Dynamic() {
  (void)DynamicAlignment<align>::known;
  return *reinterpret_cast<Array*>(DynamicShared());
}

// An address in the shared window, and back. Both fail outside of the block's shared memory.
uint32_t SharedAddress(const void* pointer);
char* SharedPointer(uint32_t address, size_t bytes, size_t align, const char* instruction);
bool IsShared(const void* pointer);

// ---------------------------------------------------------------- kernels

struct Parameter {
  uint32_t bytes;
  char kind;  // 'p' pointer, 'i' integer, 'f' floating point, 's' structure
};

struct Kernel {
  const char* name;
  void (*call)(void* const* arguments);
  const Parameter* parameters;
  unsigned count;
  unsigned max_threads;        // __launch_bounds__, 0 without
  unsigned static_shared = 0;  // bytes, filled in by the launch
  int index = 0;
};

void Register(const Kernel& kernel);

}  // namespace emulator
