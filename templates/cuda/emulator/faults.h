// Accesses that the device would refuse, caught as signals while a launch runs.
#pragma once
#include <signal.h>

#include <vector>

#include "workers.h"

namespace emulator {

// Handles signals while it lives. A fault of a kernel ends the kernel's block with a message; other faults are not ours.
class Handling {
 public:
  Handling();
  ~Handling();
  Handling(const Handling&) = delete;
  Handling& operator=(const Handling&) = delete;
};

// Says that this thread of the processor runs a worker's blocks, and gives the handler a stack: the fiber's own may have ended.
class Working {
 public:
  explicit Working(Worker* worker);
  ~Working();
  Working(const Working&) = delete;
  Working& operator=(const Working&) = delete;

 private:
  std::vector<char> memory_;
  stack_t before_{};
};

}  // namespace emulator
