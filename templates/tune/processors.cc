// What a server that measures on its processors does beside TVM's own RPC; remote.h says how.
#include "remote.h"

#include <sched.h>

#include <chrono>
#include <memory>

namespace {

constexpr int kAsleepMicroseconds = 1000;  // threads of a pool wait that long, busily, for more work
constexpr size_t kHugeBytes = 4 << 20;

void* Memory(int64_t bytes) {
  size_t size = std::max<int64_t>(bytes, 1);
  void* data = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) throw Failure{"no memory"};
  if (size >= kHugeBytes) madvise(data, size, MADV_HUGEPAGE);
  return data;
}

// The batches of x [B, T, H], as tensors [T, H] in aligned memory of their own.
std::vector<DLTensor> Batches(const DLTensor& x) {
  std::vector<DLTensor> batches;
  int64_t bytes = Bytes(x) / x.shape[0];
  for (int64_t b = 0; b < x.shape[0]; ++b) {
    batches.push_back({Memory(bytes), {kDLCPU, 0}, 2, x.dtype, x.shape + 1, nullptr, 0});
    memcpy(batches.back().data, Data(x) + b * bytes, bytes);
  }
  return batches;
}

// A compiled layer in a child, for batches of T tokens; the child's end is its end.
class Layer {
 public:
  Layer(int64_t which, const DLTensor& batch, int64_t threads) : library_(which), out_(batch) {
    forward_ = library_.Find("forward");
    workspace_bytes_ = Call(library_.Find("workspace_bytes"), {Int(batch.shape[0])}).v_int64;
    pool_ = Call(library_.Find("pool"), {Int(threads)}).v_int64;
    workspace_ = {Memory(workspace_bytes_), {kDLCPU, 0}, 1, {kDLUInt, 8, 1}, &workspace_bytes_, nullptr, 0};
    out_.data = Memory(Bytes(out_));
  }
  Layer(const Layer&) = delete;

  const DLTensor& out() const { return out_; }
  void Poison() { memset(out_.data, 0xFF, Bytes(out_)); }

  // Seconds of one call.
  double Forward(DLTensor x, DLTensor weights) {
    TVMFFIAny none{};
    auto start = std::chrono::steady_clock::now();
    Call(forward_, {Tensor(x), none, Tensor(out_), Tensor(weights), Tensor(workspace_), Int(pool_), none, none, none, none});
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }

 private:
  Library library_;
  Function forward_;
  int64_t workspace_bytes_, pool_;
  DLTensor workspace_{}, out_;
};

// Both layers on the packed weights that the child inherits.
class Bench {
 public:
  Bench(const DLTensor& x, std::vector<DLTensor> weights, int64_t threads)
      : xs_(Batches(x)), weights_(std::move(weights)), threads_(threads) {}
  void Open(int64_t library) { layers_[library] = std::make_unique<Layer>(library, xs_[0], threads_); }

  const char* Answer(int64_t library, int64_t batch, double& seconds) {
    layers_[library]->Poison();
    seconds = layers_[library]->Forward(xs_[batch], weights_[0]);
    return Data(layers_[library]->out());
  }

  // The median call out of whole cycles through the batches, after a pause that lets threads fall asleep and a call that wakes them.
  double Turn(int64_t library, int64_t, double turn_seconds) {
    const int64_t batches = xs_.size();
    auto call = [&](size_t step) { return layers_[library]->Forward(xs_[step % batches], weights_[step % weights_.size()]); };
    usleep(kAsleepMicroseconds);
    call(batches - 1);
    if (calls_ == 0) {
      double cycle_seconds = 0;
      for (int64_t b = 0; b < batches; ++b) cycle_seconds += call(b);
      calls_ = batches * std::max<int64_t>(1, std::ceil(turn_seconds / cycle_seconds));
    }
    std::vector<double> took;
    for (int64_t i = 0; i < calls_; ++i) took.push_back(call(steps_[library]++));
    std::sort(took.begin(), took.end());
    return (took[(calls_ - 1) / 2] + took[calls_ / 2]) / 2;
  }

 private:
  std::vector<DLTensor> xs_, weights_;
  int64_t threads_, calls_ = 0;
  size_t steps_[2] = {0, 0};
  std::unique_ptr<Layer> layers_[2];
};

std::string Contents(const char* path) {
  std::string text(1 << 20, 0);
  FILE* file = fopen(path, "r");
  text.resize(file == nullptr ? 0 : fread(text.data(), 1, text.size(), file));
  if (file != nullptr) fclose(file);
  return text;
}

// machine(text, limit_s, said uint8 [512]): lines `field : value`, those of /proc/cpuinfo among them.
int64_t Machine(const Given& given) {
  cpu_set_t usable;
  const bool known = sched_getaffinity(0, sizeof(usable), &usable) == 0;
  auto line = [](const char* field, int64_t value) { return std::string(field) + " : " + std::to_string(value) + "\n"; };
  Fill(given.Tensor(0), line("processors", known ? CPU_COUNT(&usable) : sysconf(_SC_NPROCESSORS_ONLN)) +
                            line("l3_bytes", std::max(0L, sysconf(_SC_LEVEL3_CACHE_SIZE))) +
                            line("memory_bytes", int64_t{sysconf(_SC_PHYS_PAGES)} * sysconf(_SC_PAGESIZE)) +
                            Contents("/proc/cpuinfo"));
  return kDone;
}

// huge(blob): asks for huge pages, as the runtime does for packed weights; before anything is written.
int64_t Huge(const Given& given) {
  constexpr uintptr_t kPage = 4096;
  DLTensor blob = given.Tensor(0);
  uintptr_t begin = (reinterpret_cast<uintptr_t>(Data(blob)) + kPage - 1) / kPage * kPage;
  uintptr_t end = reinterpret_cast<uintptr_t>(Data(blob)) + Bytes(blob);
  if (end >= begin + kHugeBytes) madvise(reinterpret_cast<void*>(begin), (end - begin) / kPage * kPage, MADV_HUGEPAGE);
  return 0;
}

}  // namespace

REMOTE_EXPORT(machine, Machine)
REMOTE_EXPORT(huge, Huge)
REMOTE_EXPORT(answers, Answers<Bench>)
REMOTE_EXPORT(times, Times<Bench>)
