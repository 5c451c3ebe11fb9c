// What the helpers of measuring servers share: arguments, libraries of layers, and child processes.
//
// A helper is uploaded by moegen.tune.host to every session of TVM's RPC. Compiled layers run in child processes that inherit the
// session's packed weights: one that crashes or hangs ends nothing but itself. Files of the session's folder: default.so and
// candidate.so. Nothing is linked, so that it compiles for any server.
#pragma once

#include <dlfcn.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <tvm/ffi/c_api.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <exception>
#include <functional>
#include <initializer_list>
#include <string>
#include <vector>

namespace {

using Function = int (*)(void*, const TVMFFIAny*, int32_t, TVMFFIAny*);

constexpr const char* kFiles[] = {"./default.so", "./candidate.so"};
constexpr double kSlowSeconds = 0.5;  // one batch of a call so long is checked
constexpr int64_t kSaidBytes = 512;

constexpr int kFinished = 77, kGaveUp = 78;  // exit statuses of children, none that a library that calls exit() would choose

// How a child ended. moegen.tune.guest knows these numbers; 16 is added when it was at the candidate and not at the default.
enum Ending : int64_t { kDone, kDied, kLate, kFailed };
constexpr int64_t kCandidate = 16;

struct Failure {
  std::string message;
};

// A function of tvm-ffi, which the process has already.
template <typename Type>
Type Ffi(const char* name) {
  void* library = dlopen("libtvm_ffi.so", RTLD_NOW | RTLD_NOLOAD);
  void* symbol = library != nullptr ? dlsym(library, name) : nullptr;
  if (symbol == nullptr) throw Failure{std::string("this process has no ") + name};
  return reinterpret_cast<Type>(symbol);
}

// ---------------------------------------------------------------- arguments

int64_t Elements(const DLTensor& t) {
  int64_t count = 1;
  for (int32_t d = 0; d < t.ndim; ++d) count *= t.shape[d];
  return count;
}

int64_t Bytes(const DLTensor& t) { return Elements(t) * t.dtype.bits / 8; }

template <typename Type = char>
Type* Data(const DLTensor& t) {
  return reinterpret_cast<Type*>(static_cast<char*>(t.data) + t.byte_offset);
}

class Given {
 public:
  Given(const TVMFFIAny* values, int32_t count) : values_(values), count_(count) {}
  int32_t count() const { return count_; }
  DLTensor Tensor(int32_t i) const {
    const TVMFFIAny& value = At(i);
    if (value.type_index == kTVMFFIDLTensorPtr) return *static_cast<const DLTensor*>(value.v_ptr);
    if (value.type_index == kTVMFFITensor) return *TVMFFITensorGetDLTensorPtr(value.v_obj);
    throw Failure{"argument " + std::to_string(i) + " must be a tensor"};
  }
  int64_t Int(int32_t i) const {
    if (At(i).type_index != kTVMFFIInt) throw Failure{"argument " + std::to_string(i) + " must be an integer"};
    return At(i).v_int64;
  }
  double Float(int32_t i) const { return At(i).type_index == kTVMFFIFloat ? At(i).v_float64 : static_cast<double>(Int(i)); }

 private:
  const TVMFFIAny& At(int32_t i) const {
    if (i >= count_) throw Failure{"argument " + std::to_string(i) + " is missing"};
    return values_[i];
  }
  const TVMFFIAny* values_;
  int32_t count_;
};

template <typename Body>
int Export(const TVMFFIAny* values, int32_t count, TVMFFIAny* result, Body body) {
  std::string message;
  try {
    *result = {};
    result->v_int64 = body(Given(values, count));
    result->type_index = kTVMFFIInt;
    return 0;
  } catch (const Failure& failure) {
    message = failure.message;
  } catch (const std::exception& error) {
    message = error.what();
  }
  Ffi<void (*)(const char*, const char*)>("TVMFFIErrorSetRaisedFromCStr")("RuntimeError", message.c_str());
  return -1;
}

// ---------------------------------------------------------------- children

// Elements that a child and its session both see.
template <typename Type>
class Shared {
 public:
  explicit Shared(int64_t count) : bytes_(std::max<int64_t>(count, 1) * sizeof(Type)) {
    void* data = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (data == MAP_FAILED) throw Failure{"no memory to share with a child"};
    data_ = static_cast<Type*>(data);
  }
  ~Shared() { munmap(data_, bytes_); }
  Shared(const Shared&) = delete;
  Type* data() { return data_; }
  void CopyTo(const DLTensor& t) { memcpy(Data(t), data_, std::min<size_t>(bytes_, Bytes(t))); }

 private:
  size_t bytes_;
  Type* data_;
};

[[noreturn]] void Work(double limit_seconds, char* said, const std::function<void()>& work) {
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  rlimit no_core{0, 0};
  setrlimit(RLIMIT_CORE, &no_core);
  for (int number = 1; number < NSIG; ++number) signal(number, SIG_DFL);
  sigset_t none;
  sigemptyset(&none);
  sigprocmask(SIG_SETMASK, &none, nullptr);
  alarm(static_cast<unsigned>(std::ceil(limit_seconds)));
  try {
    work();
    _exit(kFinished);
  } catch (const Failure& failure) {
    strncpy(said, failure.message.c_str(), kSaidBytes - 1);
  } catch (const std::exception& error) {
    strncpy(said, error.what(), kSaidBytes - 1);
  }
  _exit(kGaveUp);
}

int64_t Ended(double limit_seconds, Shared<char>& said, const std::function<void()>& work) {
  pid_t child = fork();
  if (child < 0) throw Failure{std::string("cannot start a process: ") + strerror(errno)};
  if (child == 0) Work(limit_seconds, said.data(), work);
  int status = 0;
  while (waitpid(child, &status, 0) < 0) {
    if (errno != EINTR) throw Failure{std::string("lost a child: ") + strerror(errno)};
  }
  if (WIFEXITED(status) && WEXITSTATUS(status) == kFinished) return kDone;
  if (WIFEXITED(status) && WEXITSTATUS(status) == kGaveUp) return kFailed;
  if (WIFSIGNALED(status) && WTERMSIG(status) == SIGALRM) return kLate;
  if (WIFSIGNALED(status)) {
    snprintf(said.data(), kSaidBytes, "signal %d (%s)", WTERMSIG(status), strsignal(WTERMSIG(status)));
  } else {
    snprintf(said.data(), kSaidBytes, "exit status %d", WEXITSTATUS(status));
  }
  return kDied;
}

// Runs body(who) in a child for at most so long; it sets `who` to the library that it is at. `text` takes what went wrong: what
// the child said, or how it ended.
template <typename Body>
int64_t InChild(double limit_seconds, const DLTensor& text, Body body) {
  Shared<char> said(kSaidBytes);
  Shared<int64_t> who(1);
  int64_t ending = Ended(limit_seconds, said, [&] { body(*who.data()); });
  said.CopyTo(text);
  return ending + kCandidate * *who.data();
}

// ---------------------------------------------------------------- values and functions of tvm-ffi

TVMFFIAny Int(int64_t value) {
  TVMFFIAny any{};
  any.type_index = kTVMFFIInt;
  any.v_int64 = value;
  return any;
}

TVMFFIAny Tensor(DLTensor& t) {
  TVMFFIAny any{};
  any.type_index = kTVMFFIDLTensorPtr;
  any.v_ptr = &t;
  return any;
}

[[noreturn]] void Raised() {
  TVMFFIObjectHandle error = nullptr;
  Ffi<void (*)(TVMFFIObjectHandle*)>("TVMFFIErrorMoveFromRaised")(&error);
  if (error == nullptr) throw Failure{"the library failed and did not say why"};
  const TVMFFIByteArray& message = TVMFFIErrorGetCellPtr(error)->message;
  throw Failure{std::string(message.data, message.size)};
}

// One of the session's two compiled layers.
class Library {
 public:
  explicit Library(int64_t which) : handle_(dlopen(kFiles[which], RTLD_NOW | RTLD_LOCAL)) {
    if (handle_ == nullptr) throw Failure{dlerror()};
  }
  Function Find(const char* name) const {
    void* symbol = dlsym(handle_, (std::string("__tvm_ffi_moe_") + name).c_str());
    if (symbol == nullptr) throw Failure{dlerror()};
    return reinterpret_cast<Function>(symbol);
  }

 private:
  void* handle_;  // the child's end is its end
};

TVMFFIAny Call(Function function, std::initializer_list<TVMFFIAny> arguments) {
  TVMFFIAny result{};
  if (function(nullptr, arguments.begin(), static_cast<int32_t>(arguments.size()), &result) != 0) Raised();
  return result;
}

// ---------------------------------------------------------------- what every helper is asked for

// Goes on in a child; the process itself waits, and ends well whatever becomes of the child. (TVM 0.27's server gives up for
// good when the process of a session does not end well.)
int64_t Shield(const Given&) {
  pid_t child = fork();
  if (child < 0) throw Failure{std::string("cannot start a process: ") + strerror(errno)};
  if (child == 0) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    return 0;
  }
  int status = 0;
  while (waitpid(child, &status, 0) < 0 && errno == EINTR) {
  }
  _exit(0);
}

// copy(from, to, offset): the bytes of `from` to an offset in `to`.
int64_t Copy(const Given& given) {
  DLTensor from = given.Tensor(0), to = given.Tensor(1);
  int64_t offset = given.Int(2);
  if (offset < 0 || offset + Bytes(from) > Bytes(to)) throw Failure{"copy: out of range"};
  memcpy(Data(to) + offset, Data(from), Bytes(from));
  return 0;
}

// checksum(of): CRC-32 of the bytes, as zlib has it (ISO 3309, polynomial 0xEDB88320).
int64_t Checksum(const Given& given) {
  static const std::array<uint32_t, 256> table = [] {
    std::array<uint32_t, 256> made{};
    for (uint32_t byte = 0; byte < 256; ++byte) {
      made[byte] = byte;
      for (int bit = 0; bit < 8; ++bit) made[byte] = made[byte] >> 1 ^ (made[byte] & 1 ? 0xEDB88320u : 0);
    }
    return made;
  }();
  DLTensor of = given.Tensor(0);
  const auto* next = Data<const unsigned char>(of);
  uint32_t sum = ~0u;
  for (int64_t left = Bytes(of); left > 0; --left) sum = sum >> 8 ^ table[(sum ^ *next++) & 0xFF];
  return static_cast<int64_t>(~sum);
}

void Fill(const DLTensor& to, const std::string& text) {
  memset(Data(to), 0, Bytes(to));
  memcpy(Data(to), text.data(), std::min<size_t>(text.size(), Bytes(to) - 1));
}

// answers(x [B, T, H], rows int32 [n], weights, threads, limit_s, out [2, n, H], seconds float64 [2, B], said uint8 [512])
//
// One call of both libraries for each batch into poisoned memory, only the first batch when they are slow. `out` takes the
// outputs of some tokens, `rows` in ascending order out of B * T; `seconds` of what was not called stay 0.
//
// Bench(x, weights, threads) runs in a child: Open(library) first; Answer(library, batch, took) is the output of one call.
template <typename Bench>
int64_t Answers(const Given& given) {
  DLTensor x = given.Tensor(0), rows = given.Tensor(1), weights = given.Tensor(2), to = given.Tensor(5), seconds = given.Tensor(6);
  int64_t threads = given.Int(3), batches = x.shape[0], tokens = x.shape[1], count = Elements(rows);
  int64_t row_bytes = x.shape[2] * x.dtype.bits / 8;
  Shared<char> out(2 * count * row_bytes);
  Shared<double> took(2 * batches);
  int64_t ending = InChild(given.Float(4), given.Tensor(7), [&](int64_t& who) {
    Bench bench(x, {weights}, threads);
    for (int64_t library = 0; library < 2; ++library) {
      who = library;
      bench.Open(library);
      const int32_t* row = Data<int32_t>(rows);
      char* next = out.data() + library * count * row_bytes;
      double last_seconds = 0;
      for (int64_t b = 0; b < batches && last_seconds < kSlowSeconds; ++b) {
        const char* answer = bench.Answer(library, b, last_seconds);
        took.data()[library * batches + b] = last_seconds;
        for (; row < Data<int32_t>(rows) + count && *row < (b + 1) * tokens; ++row, next += row_bytes) {
          memcpy(next, answer + (*row - b * tokens) * row_bytes, row_bytes);
        }
      }
    }
  });
  out.CopyTo(to);
  took.CopyTo(seconds);
  return ending;
}

// times(x [B, T, H], threads, rounds, turn_s, limit_s, seconds float64 [2, rounds], said uint8 [512], weights...)
//
// Rounds in which both libraries take turns, first the one and then the other, of so many calls that the default takes about
// turn_s. Calls take the batches in turn, and the copies of the weights. `seconds` takes what Bench says of each turn.
template <typename Bench>
int64_t Times(const Given& given) {
  DLTensor x = given.Tensor(0), seconds = given.Tensor(5);
  int64_t threads = given.Int(1), rounds = given.Int(2);
  double turn_seconds = given.Float(3);
  std::vector<DLTensor> weights;
  for (int32_t i = 7; i < given.count(); ++i) weights.push_back(given.Tensor(i));
  if (weights.empty()) throw Failure{"times: no weights"};
  Shared<double> found(2 * rounds);
  int64_t ending = InChild(given.Float(4), given.Tensor(6), [&](int64_t& who) {
    Bench bench(x, weights, threads);
    bench.Open(0);
    who = 1;
    bench.Open(1);
    for (int64_t round = 0; round < rounds; ++round) {
      for (int64_t turn = 0; turn < 2; ++turn) {
        who = (round + turn) % 2;
        found.data()[who * rounds + round] = bench.Turn(who, round, turn_seconds);
      }
    }
  });
  found.CopyTo(seconds);
  return ending;
}

}  // namespace

#define REMOTE_EXPORT(name, ...)                                                                           \
  extern "C" __attribute__((visibility("default"))) int __tvm_ffi_remote_##name(                           \
      void*, const TVMFFIAny* values, int32_t count, TVMFFIAny* result) {                                  \
    return Export(values, count, result, __VA_ARGS__);                                                     \
  }

REMOTE_EXPORT(shield, Shield)
REMOTE_EXPORT(copy, Copy)
REMOTE_EXPORT(checksum, Checksum)
