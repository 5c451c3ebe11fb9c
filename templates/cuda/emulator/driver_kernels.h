// Kernels of the emulated driver: found in the libraries that $MOEGEN_EMULATED_KERNELS names, launched with the driver's checks.
#pragma once
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <sstream>
#include <string>
#include <thread>

#include "device_memory.h"
#include "launch.h"

namespace emulator {

enum Result : int {
  kSuccess = 0,
  kInvalidValue = 1,
  kOutOfMemory = 2,
  kInvalidDevice = 101,
  kFileNotFound = 301,
  kInvalidHandle = 400,
  kNotFound = 500,
  kLaunchFailed = 719,
  kNotSupported = 801,
};

constexpr unsigned kPlainShared = 48 << 10;  // dynamic shared memory that needs no attribute

inline thread_local std::string said;  // why the last launch of this thread failed

// Reports what the driver itself would not say, and returns the error.
inline Result Refuse(Result result, const std::string& why) {
  said = why;
  std::fprintf(stderr, "emulated driver: %s\n", why.c_str());
  return result;
}

inline const char* Setting(const char* name, const char* otherwise) {
  const char* value = std::getenv(name);
  return value != nullptr && *value != 0 ? value : otherwise;
}

inline int Capability() {  // 90 of sm_90a
  return std::atoi(Setting("MOEGEN_EMULATED_ARCH", "sm_90") + 3);
}

inline int OptInShared() { return std::atoi(Setting("MOEGEN_EMULATED_SHARED_BYTES", "232448")); }

inline DeviceMemory& Memory() {
  static auto* memory = new DeviceMemory;  // outlives whatever frees memory when the process ends
  return *memory;
}

template <class Out, class Value>
inline Result Give(Out* out, Value value) {
  *out = value;
  return kSuccess;
}

// ---------------------------------------------------------------- kernels

struct Function {
  std::string name;
  decltype(&moegen_emulator_launch) launch = nullptr;
  int max_threads = 0, static_shared = 0, parameters = 0;
  int max_dynamic = static_cast<int>(kPlainShared);
};

struct Library {
  std::map<std::string, Function> functions;
};

// Adds the kernels of a compiled source.
inline Result Add(Library* library, const std::string& path) {
  void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) return Refuse(kFileNotFound, dlerror());
  auto next = reinterpret_cast<decltype(&moegen_emulator_kernel)>(dlsym(handle, "moegen_emulator_kernel"));
  auto launch = reinterpret_cast<decltype(&moegen_emulator_launch)>(dlsym(handle, "moegen_emulator_launch"));
  if (next == nullptr || launch == nullptr) return Refuse(kFileNotFound, path + " has no kernels");
  MoegenKernel kernel;
  for (int i = 0; next(i, &kernel) != 0; ++i) {
    Function function{kernel.name, launch, kernel.max_threads, kernel.static_shared, kernel.parameters};
    if (!library->functions.emplace(kernel.name, function).second) {
      return Refuse(kInvalidValue, std::string("there are two kernels ") + kernel.name);
    }
  }
  return kSuccess;
}

inline Result Open(Library** out) {
  static std::mutex mutex;
  static auto* libraries = new std::map<std::string, Library*>;  // by their paths: an image has the kernels of when it is loaded
  std::lock_guard<std::mutex> lock(mutex);
  const char* named = std::getenv("MOEGEN_EMULATED_KERNELS");
  if (named == nullptr) return Refuse(kFileNotFound, "$MOEGEN_EMULATED_KERNELS names no library of kernels");
  Library*& library = (*libraries)[named];
  if (library == nullptr) {
    auto opened = std::make_unique<Library>();
    std::istringstream paths(named);
    for (std::string path; std::getline(paths, path, ':');) {
      if (Result added = Add(opened.get(), path); added != kSuccess) return added;
    }
    library = opened.release();
  }
  *out = library;
  return kSuccess;
}

inline Result FindFunction(void** out, void* library, const char* name) {
  auto* from = static_cast<Library*>(library);
  if (from == nullptr) return kInvalidHandle;
  auto found = from->functions.find(name);
  if (found == from->functions.end()) return Refuse(kNotFound, std::string("there is no kernel ") + name);
  *out = &found->second;
  return kSuccess;
}

inline int OrderNamed(const std::string& name) { return name == "shuffled" ? 2 : name == "descending" ? 1 : 0; }

// For tests: how often kernels were launched, and how often somebody waited for the device.
inline long launches = 0, waits = 0;

inline Result Launch(Function* function, const unsigned (&grid)[3], const unsigned (&block)[3], unsigned shared, void** parameters,
                     void** extra) {
  ++launches;
  if (function == nullptr) return kInvalidHandle;
  if (extra != nullptr) return Refuse(kNotSupported, "launches with a buffer of arguments are not emulated");
  if (parameters == nullptr && function->parameters > 0)
    return Refuse(kInvalidValue, "kernel " + function->name + " got no arguments");
  if (shared > static_cast<unsigned>(function->max_dynamic)) {
    return Refuse(kInvalidValue, "kernel " + function->name + " is launched with " + std::to_string(shared) +
                                     " bytes of dynamic shared memory, and its attribute allows " +
                                     std::to_string(function->max_dynamic));
  }
  MoegenLaunch request{};
  request.kernel = function->name.c_str();
  for (int i = 0; i < 3; ++i) {
    request.grid[i] = grid[i];
    request.block[i] = block[i];
  }
  request.shared_bytes = shared;
  int threads = std::atoi(Setting("MOEGEN_EMULATED_THREADS", "0"));
  request.threads = threads > 0 ? static_cast<unsigned>(threads) : std::thread::hardware_concurrency();
  request.order = OrderNamed(Setting("MOEGEN_EMULATED_ORDER", "ascending"));
  request.seed = std::strtoull(Setting("MOEGEN_EMULATED_SEED", "0"), nullptr, 10);
  request.arguments = parameters;
  char message[4096];
  const void* fault = nullptr;  // which address, when the message says that one was refused
  size_t bytes;
  if (function->launch(&request, message, sizeof message, &fault) != 0) {
    while (Memory().Overrun(&bytes) != 0) continue;  // said once is enough
    return Refuse(kLaunchFailed, message);
  }
  if (Memory().Overrun(&bytes) == 0) return kSuccess;
  return Refuse(kLaunchFailed,
                "kernel " + function->name + " writes after the end of an allocation of " + std::to_string(bytes) + " bytes");
}

inline Result GetAttribute(int* out, int attribute, const Function* function) {
  if (function == nullptr) return kInvalidHandle;
  switch (attribute) {
    case 0: *out = function->max_threads > 0 ? function->max_threads : 1024; return kSuccess;
    case 1: *out = function->static_shared; return kSuccess;
    case 2:
    case 3: *out = 0; return kSuccess;   // constant and local bytes
    case 4: *out = 64; return kSuccess;  // registers
    case 5:
    case 6: *out = Capability(); return kSuccess;
    case 8: *out = function->max_dynamic; return kSuccess;
    default: return kInvalidValue;
  }
}

inline Result SetAttribute(Function* function, int attribute, int value) {
  if (function == nullptr) return kInvalidHandle;
  if (attribute != 8) return attribute > 8 && attribute < 16 ? kSuccess : kInvalidValue;  // hints
  if (value < 0 || value + function->static_shared > OptInShared()) {
    return Refuse(kInvalidValue, "kernel " + function->name + " is to have " + std::to_string(value) +
                                     " bytes of dynamic shared memory beside " + std::to_string(function->static_shared) +
                                     ", the device has " + std::to_string(OptInShared()));
  }
  function->max_dynamic = value;
  return kSuccess;
}

}  // namespace emulator
