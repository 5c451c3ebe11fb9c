// What a thread of the processor needs to run blocks: stacks for their fibers and an arena for their shared memory.
#pragma once
#include <sys/mman.h>

#include "block.h"

namespace emulator {

constexpr size_t kStackBytes = 256 << 10;  // of a fiber: its local arrays, and g++ overlays fewer of them than nvcc does
constexpr size_t kPage = 4096;
constexpr size_t kGuard = 16 << 20;
constexpr size_t kArenaAlign = 1024;

inline size_t RoundUp(size_t value, size_t to) { return (value + to - 1) / to * to; }

// Memory with inaccessible pages on both sides, enough of them for indices that are far off.
class Mapping {
 public:
  explicit Mapping(size_t bytes) : bytes_(RoundUp(bytes, kPage)) {
    void* all = mmap(nullptr, bytes_ + 2 * kGuard, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (all == MAP_FAILED) return;
    all_ = static_cast<char*>(all);
    if (mprotect(begin(), bytes_, PROT_READ | PROT_WRITE) != 0) Unmap();
  }
  ~Mapping() { Unmap(); }
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;

  explicit operator bool() const { return all_ != nullptr; }
  char* begin() const { return all_ + kGuard; }
  char* end() const { return begin() + bytes_; }
  bool Guards(const void* address) const {
    auto* at = static_cast<const char*>(address);
    return (at >= all_ && at < begin()) || (at >= end() && at < end() + kGuard);
  }

 private:
  void Unmap() {
    if (all_ != nullptr) munmap(all_, bytes_ + 2 * kGuard);
    all_ = nullptr;
  }
  size_t bytes_;
  char* all_ = nullptr;
};

struct Worker {
  // `static_bytes`: of the shared variables of all kernels.
  explicit Worker(size_t static_bytes)
      : stacks((kStackBytes + kPage) * kMaxThreads), arena(kSharedLimit + static_bytes + 2 * kArenaAlign) {
    if (!stacks || !arena) return;
    for (unsigned i = 0; i < kMaxThreads; ++i) mprotect(stacks.begin() + i * (kStackBytes + kPage), kPage, PROT_NONE);
    block.stacks = stacks.begin();
    block.stack_stride = kStackBytes + kPage;
    usable = true;
  }
  Mapping stacks, arena;
  Block block;
  bool usable = false;
};

}  // namespace emulator
