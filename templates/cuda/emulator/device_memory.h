// Memory of the emulated device: memory of this process, poisoned when it is given out, with inaccessible pages around it.
#pragma once
#include <sys/mman.h>

#include <cstdint>
#include <cstring>
#include <map>
#include <mutex>

namespace emulator {

class DeviceMemory {
 public:
  // The address of `bytes` that end, but for less than 256 bytes, at an inaccessible page; 0 when there is no memory.
  uint64_t Give(size_t bytes) {
    size_t room = RoundUp(bytes, kAlign), inner = RoundUp(room, kPage), outer = inner + 2 * kGuard;
    void* base = mmap(nullptr, outer, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED) return 0;
    char* begin = static_cast<char*>(base) + kGuard;
    if (mprotect(begin, inner, PROT_READ | PROT_WRITE) != 0) return 0;
    begin += inner - room;
    std::memset(begin, 0xff, room);
    std::lock_guard<std::mutex> lock(mutex_);
    given_[reinterpret_cast<uint64_t>(begin)] = {bytes, base, outer};
    total_ += bytes;
    return reinterpret_cast<uint64_t>(begin);
  }

  // False when the address is not one that Give has returned. Whoever uses it afterwards gets a fault.
  bool Take(uint64_t address) {
    std::lock_guard<std::mutex> lock(mutex_);
    auto found = given_.find(address);
    if (found == given_.end()) return false;
    total_ -= found->second.bytes;
    munmap(found->second.base, found->second.outer);
    given_.erase(found);
    return true;
  }

  // Where the allocation with this address in it begins and how large it is; false when there is none.
  bool Find(uint64_t address, uint64_t* begin, size_t* bytes) {
    std::lock_guard<std::mutex> lock(mutex_);
    auto after = given_.upper_bound(address);
    if (after == given_.begin()) return false;
    --after;
    if (address >= after->first + after->second.bytes) return false;
    *begin = after->first;
    *bytes = after->second.bytes;
    return true;
  }

  bool Holds(uint64_t address, size_t bytes) {
    uint64_t begin;
    size_t size;
    return bytes == 0 || (Find(address, &begin, &size) && bytes <= size - (address - begin));
  }

  // The first allocation after whose last byte something was written, in the bytes before the inaccessible page; 0 when all is
  // well. What was written there is forgotten.
  uint64_t Overrun(size_t* bytes) {
    std::lock_guard<std::mutex> lock(mutex_);
    for (const auto& [address, allocation] : given_) {
      auto* begin = reinterpret_cast<unsigned char*>(address + allocation.bytes);
      auto* end = reinterpret_cast<unsigned char*>(address + RoundUp(allocation.bytes, kAlign));
      for (unsigned char* at = begin; at < end; ++at) {
        if (*at == 0xff) continue;
        std::memset(begin, 0xff, static_cast<size_t>(end - begin));
        *bytes = allocation.bytes;
        return address;
      }
    }
    return 0;
  }

  size_t total() {
    std::lock_guard<std::mutex> lock(mutex_);
    return total_;
  }

 private:
  static constexpr size_t kAlign = 256, kPage = 4096, kGuard = 16 << 20;
  static size_t RoundUp(size_t value, size_t to) { return (value + to - 1) / to * to; }

  struct Allocation {
    size_t bytes;
    void* base;
    size_t outer;
  };
  std::mutex mutex_;
  std::map<uint64_t, Allocation> given_;
  size_t total_ = 0;
};

}  // namespace emulator
