// Launches: kernels by name, and their blocks one after another on every worker.
#include "launch.h"

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <numeric>
#include <thread>

#include "faults.h"

namespace emulator {
namespace {

constexpr unsigned kGridLimit[] = {0x7fffffff, 0xffff, 0xffff};
constexpr unsigned kBlockLimit[] = {1024, 1024, 64};

// ---------------------------------------------------------------- what the compiled source registers when it is loaded

struct Registry {
  std::vector<Kernel> kernels;
  std::vector<unsigned> shared;  // static bytes of each kernel
  size_t static_bytes = 0, dynamic_align = 16;
};

Registry& Known() {
  static Registry registry;
  return registry;
}

const Kernel* Find(const char* name) {
  for (const Kernel& kernel : Known().kernels) {
    if (std::strcmp(kernel.name, name) == 0) return &kernel;
  }
  return nullptr;
}

// ---------------------------------------------------------------- workers

std::mutex idle_mutex;
std::vector<Worker*> idle;  // kept for the next launch: making one maps a quarter of a gigabyte

Worker* TakeWorker() {
  std::lock_guard<std::mutex> lock(idle_mutex);
  if (idle.empty()) return new Worker(Known().static_bytes);
  Worker* worker = idle.back();
  idle.pop_back();
  return worker;
}

void GiveWorker(Worker* worker) {
  std::lock_guard<std::mutex> lock(idle_mutex);
  idle.push_back(worker);
}

// ---------------------------------------------------------------- one launch

struct Launch {
  const Kernel* kernel;
  dim3 grid, size;
  unsigned shared;
  void* const* arguments;
  Order order;
  uint64_t seed;
  uint64_t blocks;
  std::atomic<uint64_t> next{0};
  std::atomic<bool> failed{false};
  std::mutex mutex;
  std::string message;
  const void* fault = nullptr;
};

void Arrange(Worker* worker, const Launch& launch) {
  Block& block = worker->block;
  block.kernel = launch.kernel;
  block.arguments = launch.arguments;
  block.order = launch.order;
  block.place.grid = launch.grid;
  block.place.size = launch.size;
  block.dynamic_at = static_cast<uint32_t>(RoundUp(Known().static_bytes, Known().dynamic_align));
  block.arena_bytes = block.dynamic_at + launch.shared;
  block.arena = worker->arena.end() - RoundUp(block.arena_bytes, kArenaAlign);
}

// The slack between the end of shared memory and the inaccessible page holds poison, unless a kernel wrote there.
bool SlackIntact(const Worker& worker) {
  const char* at = worker.block.arena + worker.block.arena_bytes;
  return std::all_of(at, static_cast<const char*>(worker.arena.end()),
                     [](char c) { return static_cast<unsigned char>(c) == kPoison; });
}

uint64_t Scrambled(uint64_t ticket, const Launch& launch) {
  if (launch.order == Order::kDescending) return launch.blocks - 1 - ticket;
  if (launch.order == Order::kAscending) return ticket;
  uint64_t stride = launch.seed % launch.blocks | 1;  // any number without a common factor visits every block once
  while (std::gcd(stride, launch.blocks) != 1) stride += 2;
  return (launch.seed + ticket * (stride % launch.blocks)) % launch.blocks;
}

void RunBlocks(Launch* launch) {
  Worker* worker = TakeWorker();
  if (!worker->usable) {
    std::lock_guard<std::mutex> lock(launch->mutex);
    if (!launch->failed.exchange(true)) launch->message = "no memory for the stacks of a block's threads";
    return;
  }
  Arrange(worker, *launch);
  Working working(worker);
  Block& block = worker->block;
  const dim3& grid = launch->grid;
  while (!launch->failed) {
    uint64_t ticket = launch->next++;
    if (ticket >= launch->blocks) break;
    uint64_t index = Scrambled(ticket, *launch);
    block.place.block = {static_cast<unsigned>(index % grid.x), static_cast<unsigned>(index / grid.x % grid.y),
                         static_cast<unsigned>(index / grid.x / grid.y)};
    block.random = Random(launch->seed + index);
    std::memset(block.arena + block.arena_bytes, kPoison,
                static_cast<size_t>(worker->arena.end() - block.arena) - block.arena_bytes);
    Run(&block);
    if (!block.failed && !SlackIntact(*worker)) {
      const uint3& at = block.place.block;
      block.message = std::string("kernel ") + block.kernel->name + ", block (" + std::to_string(at.x) + ", " +
                      std::to_string(at.y) + ", " + std::to_string(at.z) + "): a write beyond the end of the block's shared memory";
      block.failed = true;
    }
    if (block.failed) {
      std::lock_guard<std::mutex> lock(launch->mutex);
      if (!launch->failed.exchange(true)) {
        launch->message = block.message;
        launch->fault = block.fault;
      }
    }
  }
  block.fault = nullptr;
  GiveWorker(worker);
}

std::string Refusal(const Launch& launch) {
  const dim3 &grid = launch.grid, &size = launch.size;
  auto said = [](const char* what, uint64_t value, uint64_t limit) {
    return std::string(what) + " is " + std::to_string(value) + ", the limit is " + std::to_string(limit);
  };
  const unsigned grids[] = {grid.x, grid.y, grid.z}, sizes[] = {size.x, size.y, size.z};
  for (int i = 0; i < 3; ++i) {
    if (grids[i] == 0 || grids[i] > kGridLimit[i]) return said("a grid's size", grids[i], kGridLimit[i]) + " (and 0 is none)";
    if (sizes[i] == 0 || sizes[i] > kBlockLimit[i]) return said("a block's size", sizes[i], kBlockLimit[i]) + " (and 0 is none)";
  }
  uint64_t threads = uint64_t{size.x} * size.y * size.z;
  if (threads > kMaxThreads) return said("the number of threads of a block", threads, kMaxThreads);
  if (launch.kernel->max_threads != 0 && threads > launch.kernel->max_threads) {
    return said("the number of threads of a block", threads, launch.kernel->max_threads) + " (__launch_bounds__)";
  }
  size_t shared = size_t{launch.kernel->static_shared} + launch.shared;
  if (shared > kSharedLimit) return said("a block's shared memory in bytes", shared, kSharedLimit);
  return "";
}

}  // namespace

void Register(const Kernel& kernel) {
  Registry& registry = Known();
  registry.kernels.push_back(kernel);
  registry.shared.resize(std::max(registry.shared.size(), static_cast<size_t>(kernel.index) + 1));
}

uint32_t ReserveShared(size_t bytes, size_t align, int kernel) {
  Registry& registry = Known();
  size_t at = RoundUp(registry.static_bytes, align);
  registry.static_bytes = at + bytes;
  if (kernel >= 0) {
    registry.shared.resize(std::max(registry.shared.size(), static_cast<size_t>(kernel) + 1));
    registry.shared[static_cast<size_t>(kernel)] += static_cast<unsigned>(bytes);
  }
  return static_cast<uint32_t>(at);
}

void AlignDynamicShared(size_t align) { Known().dynamic_align = std::max(Known().dynamic_align, align); }

char* SharedArena() { return current->block->arena; }
char* DynamicShared() { return current->block->arena + current->block->dynamic_at; }

bool IsShared(const void* pointer) {
  const Block& block = *current->block;
  auto* at = static_cast<const char*>(pointer);
  return at >= block.arena && at <= block.arena + block.arena_bytes;
}

uint32_t SharedAddress(const void* pointer) {
  if (!IsShared(pointer)) Fail("%p is made an address of shared memory, and is not in the block's", pointer);
  return static_cast<uint32_t>(static_cast<const char*>(pointer) - current->block->arena) + kSharedBase;
}

char* SharedPointer(uint32_t address, size_t bytes, size_t align, const char* instruction) {
  const Block& block = *current->block;
  if (address % align != 0) Fail("%s: address 0x%x of shared memory is not a multiple of %zu", instruction, address, align);
  if (address < kSharedBase || address - kSharedBase + bytes > block.arena_bytes) {
    Fail("%s: %zu bytes at address 0x%x are not inside the block's %u bytes of shared memory, which begin at 0x%x", instruction,
         bytes, address, block.arena_bytes, kSharedBase);
  }
  return block.arena + (address - kSharedBase);
}

}  // namespace emulator

using namespace emulator;

int moegen_emulator_kernel(int index, MoegenKernel* out) {
  const Registry& registry = Known();
  if (index < 0 || static_cast<size_t>(index) >= registry.kernels.size()) return 0;
  const Kernel& kernel = registry.kernels[static_cast<size_t>(index)];
  *out = {kernel.name, static_cast<int>(kernel.count), static_cast<int>(kernel.max_threads),
          static_cast<int>(registry.shared[static_cast<size_t>(kernel.index)])};
  return 1;
}

int moegen_emulator_parameter(const char* name, int index, char* kind) {
  const Kernel* kernel = Find(name);
  if (kernel == nullptr || index < 0 || index >= static_cast<int>(kernel->count)) return -1;
  *kind = kernel->parameters[index].kind;
  return static_cast<int>(kernel->parameters[index].bytes);
}

int moegen_emulator_tensor_map(void* out, int type, unsigned rank, uint64_t address, const uint64_t* dims, const uint64_t* strides,
                               const uint32_t* box, int swizzle, char* message, unsigned bytes) {
  const uint32_t steps[5] = {1, 1, 1, 1, 1};
  std::string refusal = EncodeTensorMap({type, rank, address, dims, strides, box, steps, 0, swizzle, 0}, out);
  std::snprintf(message, bytes, "%s", refusal.c_str());
  return refusal.empty() ? 0 : 1;
}

int moegen_emulator_launch(const MoegenLaunch* request, char* message, unsigned bytes, const void** fault) {
  Launch launch;
  launch.kernel = Find(request->kernel);
  *fault = nullptr;
  if (launch.kernel == nullptr) {
    std::snprintf(message, bytes, "there is no kernel %s", request->kernel);
    return 1;
  }
  Kernel kernel = *launch.kernel;
  kernel.static_shared = Known().shared[static_cast<size_t>(kernel.index)];
  launch.kernel = &kernel;
  launch.grid = {request->grid[0], request->grid[1], request->grid[2]};
  launch.size = {request->block[0], request->block[1], request->block[2]};
  launch.shared = request->shared_bytes;
  launch.arguments = request->arguments;
  launch.order = static_cast<Order>(request->order);
  launch.seed = request->seed;
  launch.blocks = uint64_t{launch.grid.x} * launch.grid.y * launch.grid.z;
  if (std::string refusal = Refusal(launch); !refusal.empty()) {
    std::snprintf(message, bytes, "kernel %s: %s", request->kernel, refusal.c_str());
    return 1;
  }
  Handling handling;
  std::vector<std::thread> others;
  uint64_t wanted = std::min<uint64_t>(request->threads, launch.blocks);
  for (uint64_t i = 1; i < wanted; ++i) others.emplace_back(RunBlocks, &launch);
  RunBlocks(&launch);
  for (std::thread& other : others) other.join();
  if (!launch.failed) return 0;
  *fault = launch.fault;
  std::snprintf(message, bytes, "%s", launch.message.c_str());
  return 1;
}
