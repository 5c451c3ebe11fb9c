// A pool of worker threads that belongs to one layer, and the three functions that code compiled by TVM asks for.
//
// A parallel region is split into tasks that threads claim one by one, so a thread that is held up delays one task only.
// Which thread computes a task never changes its result. A region that finds the pool busy runs on its caller alone.
//
// Threads, locks and clocks are the system's own: the headers of C++'s take a sixth of the time that compiling a host takes.
#pragma once
#include <pthread.h>
#include <sched.h>
#include <time.h>
#include <tvm/ffi/c_api.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <vector>

namespace moegen {

struct Env {
  void* sync;
  int32_t num_task;
};
using Task = int (*)(int, Env*, void*);

inline void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Nanoseconds of a clock that only goes forward.
inline int64_t Now() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return static_cast<int64_t>(time.tv_sec) * 1000000000 + time.tv_nsec;
}

// Waiting without giving the processor away, for a while: a sleeping thread takes longer to wake than a small layer to run.
class Spin {
 public:
  // False when it is time to sleep.
  bool Once() {
    Pause();
    return ++count_ % 64 != 0 || Now() < until_;
  }

 private:
  static constexpr int64_t kWhile = 200000;
  int64_t until_ = Now() + kWhile;
  unsigned count_ = 0;
};

class Locked {
 public:
  explicit Locked(pthread_mutex_t* mutex) : mutex_(mutex) { pthread_mutex_lock(mutex_); }
  ~Locked() { pthread_mutex_unlock(mutex_); }

 private:
  pthread_mutex_t* mutex_;
};

class Pool {
 public:
  explicit Pool(int threads) : threads_(threads) { Start(); }

  // Ends the workers; in a forked child, where they do not exist and their locks cannot be destroyed, the pool is abandoned.
  static void Free(Pool* pool) {
    if (getpid() == pool->pid_) delete pool;
  }

  ~Pool() {
    stop_.store(true);
    Wake();
    for (pthread_t worker : workers_) pthread_join(worker, nullptr);
    pthread_cond_destroy(&wake_);
    pthread_mutex_destroy(&sleep_mutex_);
  }

  int threads() const { return threads_; }

  // Takes the pool for one caller; false when another one has it.
  bool Enter() {
    if (busy_.exchange(true, std::memory_order_acquire)) return false;
    if (getpid() != pid_) Restart();
    return true;
  }
  void Leave() { busy_.store(false, std::memory_order_release); }

  int Run(Task task, void* closure, int tasks) {
    task_ = task;
    closure_ = closure;
    done_.store(0, std::memory_order_relaxed);
    failed_.store(0, std::memory_order_relaxed);
    epoch_ = (epoch_ + 1) & 0xffffff;
    ticket_.store(epoch_ << 40 | static_cast<uint64_t>(tasks) << 20, std::memory_order_seq_cst);
    if (sleepers_.load(std::memory_order_seq_cst) > 0) Wake();
    while (Work()) {
    }
    for (Spin spin; done_.load(std::memory_order_acquire) != tasks;) {
      if (!spin.Once()) sched_yield();
    }
    return failed_.load(std::memory_order_relaxed);
  }

 private:
  static bool Open(uint64_t ticket) { return (ticket & 0xfffff) < (ticket >> 20 & 0xfffff); }

  // Claims and runs one task; false when none is left. The ticket holds epoch, number of tasks and next task.
  bool Work() {
    uint64_t ticket = ticket_.load(std::memory_order_acquire);
    while (Open(ticket)) {
      if (!ticket_.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel)) continue;
      Env env{nullptr, static_cast<int32_t>(ticket >> 20 & 0xfffff)};
      int rc = task_(static_cast<int>(ticket & 0xfffff), &env, closure_);
      if (rc != 0) failed_.store(rc, std::memory_order_relaxed);
      done_.fetch_add(1, std::memory_order_release);
      return true;
    }
    return false;
  }

  void Loop() {
    while (!stop_.load(std::memory_order_relaxed)) {
      bool worked = false;
      for (Spin spin; !(worked = Work()) && spin.Once();) {
      }
      if (!worked) Sleep();
    }
  }

  void Sleep() {
    Locked locked(&sleep_mutex_);
    sleepers_.fetch_add(1, std::memory_order_seq_cst);
    while (!stop_.load() && !Open(ticket_.load(std::memory_order_seq_cst))) pthread_cond_wait(&wake_, &sleep_mutex_);
    sleepers_.fetch_sub(1, std::memory_order_seq_cst);
  }

  // Whoever is about to sleep holds the lock, and has seen what has been stored or hears this.
  void Wake() {
    { Locked locked(&sleep_mutex_); }
    pthread_cond_broadcast(&wake_);
  }

  static void* Begin(void* pool) {
    static_cast<Pool*>(pool)->Loop();
    return nullptr;
  }

  void Start() {
    pid_ = getpid();
    workers_.reserve(threads_);
    for (int i = 1; i < threads_; ++i) {
      pthread_t worker;
      if (pthread_create(&worker, nullptr, Begin, this) != 0) break;  // the system gives no more: the ones there are do the work
      workers_.push_back(worker);
    }
  }

  // In a forked child: the parent's threads do not exist here, and its locks may be in any state.
  void Restart() {
    workers_.clear();
    pthread_mutex_init(&sleep_mutex_, nullptr);
    pthread_cond_init(&wake_, nullptr);
    sleepers_.store(0);
    Start();
  }

  int threads_;
  pid_t pid_ = 0;
  std::atomic<bool> busy_{false};
  std::atomic<bool> stop_{false};
  alignas(64) std::atomic<uint64_t> ticket_{0};
  alignas(64) std::atomic<int> done_{0};
  std::atomic<int> failed_{0};
  std::atomic<int> sleepers_{0};
  uint64_t epoch_ = 0;
  Task task_ = nullptr;
  void* closure_ = nullptr;
  pthread_mutex_t sleep_mutex_ = PTHREAD_MUTEX_INITIALIZER;
  pthread_cond_t wake_ = PTHREAD_COND_INITIALIZER;
  std::vector<pthread_t> workers_;
};

// What parallel loops on this thread run with. `pool` is null inside a worker and when another caller has the pool.
struct Region {
  Pool* pool = nullptr;
  int tasks = 1;
};
inline thread_local Region region;

// Makes `pool` the one that this thread's parallel loops use, for the length of a call.
class Using {
 public:
  explicit Using(Pool* pool) : pool_(pool != nullptr && pool->threads() > 1 && pool->Enter() ? pool : nullptr) { region = {pool_, 1}; }
  ~Using() {
    region = {};
    if (pool_ != nullptr) pool_->Leave();
  }

 private:
  Pool* pool_;
};

constexpr int kTasksPerThread = 4;

// Tasks for a loop of `extent` iterations that does `work` operations altogether: small loops are not worth waking anybody.
inline int Tasks(int64_t extent, double work, int per_thread = kTasksPerThread) {
  if (region.pool == nullptr) return 1;
  double worthwhile = 1 + work / 100000.0;
  return static_cast<int>(std::min<double>({static_cast<double>(extent), 1.0 * per_thread * region.pool->threads(), worthwhile}));
}

inline int Launch(Task task, void* closure, int tasks) {
  if (region.pool == nullptr || tasks <= 1) {
    Env env{nullptr, 1};
    return task(0, &env, closure);
  }
  return region.pool->Run(task, closure, tasks);
}

// Scratch memory of compiled stages: blocks are kept per thread and reused.
class Scratch {
 public:
  ~Scratch() {
    for (auto& block : blocks_) free(block.data);
  }
  void* Take(uint64_t bytes) {
    for (auto& block : blocks_) {
      if (!block.taken && block.bytes >= bytes) {
        block.taken = true;
        return block.data;
      }
    }
    void* data = nullptr;
    if (posix_memalign(&data, 64, bytes) != 0) return nullptr;
    blocks_.push_back({data, bytes, true});
    return data;
  }
  int Give(void* data) {
    for (size_t i = 0; i < blocks_.size(); ++i) {
      if (blocks_[i].data != data) continue;
      blocks_[i].taken = false;
      if (blocks_[i].bytes > kKeepBytes) {
        free(data);
        blocks_.erase(blocks_.begin() + i);
      }
      return 0;
    }
    return -1;
  }

 private:
  static constexpr uint64_t kKeepBytes = 1 << 20;
  struct Block {
    void* data;
    uint64_t bytes;
    bool taken;
  };
  std::vector<Block> blocks_;
};
inline thread_local Scratch scratch;

}  // namespace moegen

extern "C" {
// Weak variables of code compiled by TVM; set before anything runs.
extern void* __TVMBackendParallelLaunch;
extern void* __TVMBackendAllocWorkspace __attribute__((weak));
extern void* __TVMBackendFreeWorkspace __attribute__((weak));

static int MoegenLaunch(moegen::Task task, void* closure, int) {
  int rc = moegen::Launch(task, closure, moegen::region.tasks);
  if (rc != 0) TVMFFIErrorSetRaisedFromCStr("MemoryError", "a compiled stage found no memory");
  return rc;
}
static void* MoegenAlloc(int, int, uint64_t bytes, int, int) {
  void* data = moegen::scratch.Take(bytes);
  if (data == nullptr) TVMFFIErrorSetRaisedFromCStr("MemoryError", "a compiled stage found no memory");
  return data;
}
static int MoegenFree(int, int, void* data) { return moegen::scratch.Give(data); }
}

__attribute__((constructor)) static void MoegenConnect() {
  __TVMBackendParallelLaunch = reinterpret_cast<void*>(MoegenLaunch);
  if (&__TVMBackendAllocWorkspace != nullptr) __TVMBackendAllocWorkspace = reinterpret_cast<void*>(MoegenAlloc);
  if (&__TVMBackendFreeWorkspace != nullptr) __TVMBackendFreeWorkspace = reinterpret_cast<void*>(MoegenFree);
}
