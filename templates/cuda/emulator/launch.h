// What a library of emulated kernels exports: Python and the emulated driver call it.
#pragma once
#include <cstdint>

extern "C" {

struct MoegenKernel {
  const char* name;
  int parameters, max_threads, static_shared;
};

struct MoegenLaunch {
  const char* kernel;
  unsigned grid[3], block[3];
  unsigned shared_bytes;
  unsigned threads;  // of the processor
  int order;         // 0 ascending, 1 descending, 2 shuffled
  uint64_t seed;
  void* const* arguments;  // the address of each
};

#define MOEGEN_EXPORT __attribute__((visibility("default")))

// The kernel of that number; 0 when there are fewer.
MOEGEN_EXPORT int moegen_emulator_kernel(int index, MoegenKernel* out);

// Bytes of a parameter and its kind ('p' pointer, 'i' integer, 'f' floating point, 's' structure); -1 when there is none.
MOEGEN_EXPORT int moegen_emulator_parameter(const char* kernel, int index, char* kind);

// Makes the 128 bytes of a tensor map, with the arguments of cuTensorMapEncodeTiled. 0, or 1 with a message.
MOEGEN_EXPORT int moegen_emulator_tensor_map(void* out, int type, unsigned rank, uint64_t address, const uint64_t* dims,
                                             const uint64_t* strides, const uint32_t* box, int swizzle, char* message,
                                             unsigned bytes);

// Runs a kernel to its end. 0, or 1 with a message and, where memory was the reason, the address.
MOEGEN_EXPORT int moegen_emulator_launch(const MoegenLaunch* request, char* message, unsigned bytes, const void** fault);
}
