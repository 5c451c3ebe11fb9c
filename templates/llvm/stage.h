// Calling compiled stages and reading arguments through tvm-ffi's C interface.
#pragma once
#include <dlpack/dlpack.h>
#include <tvm/ffi/c_api.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <exception>
#include <initializer_list>
#include <new>

#include "pool.h"

namespace moegen {

using Stage = int (*)(void*, const TVMFFIAny*, int32_t, TVMFFIAny*);

constexpr DLDataType kF32{kDLFloat, 32, 1};
constexpr DLDataType kF64{kDLFloat, 64, 1};
constexpr DLDataType kF16{kDLFloat, 16, 1};
constexpr DLDataType kBF16{kDLBfloat, 16, 1};
constexpr DLDataType kI64{kDLInt, 64, 1};
constexpr DLDataType kI32{kDLInt, 32, 1};
constexpr DLDataType kI8{kDLInt, 8, 1};
constexpr DLDataType kU32{kDLUInt, 32, 1};
constexpr DLDataType kU16{kDLUInt, 16, 1};
constexpr DLDataType kU8{kDLUInt, 8, 1};

// Thrown inside the library only; every exported function turns it into a tvm-ffi error.
struct Failure {
  const char* kind;  // null when the error has been raised already
  char message[256];
};

// These two are compiled once, out of the way of what runs: throwing in place would be most of a host's code.
[[noreturn, gnu::cold, gnu::noinline]] inline void Fail(const char* kind, const char* message) {
  Failure failure{kind, {}};
  std::snprintf(failure.message, sizeof(failure.message), "%s", message);
  throw failure;
}

// Ends the call for what the caller has given; numbers are all int64_t ("%ld").
[[noreturn, gnu::cold, gnu::noinline, gnu::format(printf, 1, 2)]] inline void Refuse(const char* format, ...) {
  Failure failure{"ValueError", {}};
  std::va_list values;
  va_start(values, format);
  std::vsnprintf(failure.message, sizeof(failure.message), format, values);
  va_end(values);
  throw failure;
}

// The arguments of one call of a compiled stage.
class Arguments {
 public:
  Arguments& Tensor(const void* data, DLDataType dtype, std::initializer_list<int64_t> shape) {
    std::copy(shape.begin(), shape.end(), shapes_[count_]);
    DLTensor* tensor = &tensors_[count_];
    *tensor = {const_cast<void*>(data), {kDLCPU, 0}, static_cast<int32_t>(shape.size()), dtype, shapes_[count_], nullptr, 0};
    Next(kTVMFFIDLTensorPtr).v_ptr = tensor;
    return *this;
  }
  Arguments& Int(int64_t value) {
    Next(kTVMFFIInt).v_int64 = value;
    return *this;
  }
  // Runs a stage without a parallel loop of its own.
  void Call(Stage stage) {
    TVMFFIAny result{};
    if (stage(nullptr, values_, count_, &result) != 0) Fail(nullptr, "a compiled stage failed");
  }
  // Runs a stage whose parallel loop has `extent` iterations that do `work` operations together.
  void Call(Stage stage, int64_t extent, double work) {
    region.tasks = Tasks(extent, work);
    TVMFFIAny result{};
    int rc = stage(nullptr, values_, count_, &result);
    region.tasks = 1;
    if (rc != 0) Fail(nullptr, "a compiled stage failed");
  }

 private:
  TVMFFIAny& Next(int32_t type) {
    TVMFFIAny& value = values_[count_++];
    value = {};
    value.type_index = type;
    return value;
  }
  static constexpr int kMost = 14;
  int count_ = 0;
  TVMFFIAny values_[kMost];
  DLTensor tensors_[kMost];
  int64_t shapes_[kMost][6];
};

// Runs body(from, to) on parts of [0, extent), whose iterations do `work` operations together, on the threads of the call's pool.
template <typename Body>
void Parallel(int64_t extent, double work, Body body, int per_thread = kTasksPerThread) {
  struct Loop {
    Body& body;
    int64_t extent;
  } loop{body, extent};
  auto task = [](int index, Env* env, void* closure) {
    Loop& loop = *static_cast<Loop*>(closure);
    int64_t from = loop.extent * index / env->num_task, to = loop.extent * (index + 1) / env->num_task;
    try {
      if (from < to) loop.body(from, to);
    } catch (...) {
      return -1;
    }
    return 0;
  };
  if (extent > 0 && Launch(task, &loop, Tasks(extent, work, per_thread)) != 0) Fail("MemoryError", "a compiled stage found no memory");
}

// Where `Timed` adds up the seconds of each part of a call; null when nobody asked.
inline thread_local double* watch = nullptr;

class Watching {
 public:
  explicit Watching(double* seconds) { watch = seconds; }
  ~Watching() { watch = nullptr; }
};

// Adds the time from here to Stop, or to the end of the scope, to a part.
class Timed {
 public:
  explicit Timed(int part) : seconds_(watch != nullptr ? watch + part : nullptr) {
    if (seconds_ != nullptr) start_ = Now();
  }
  ~Timed() { Stop(); }
  void Stop() {
    if (seconds_ == nullptr) return;
    *seconds_ += 1e-9 * static_cast<double>(Now() - start_);
    seconds_ = nullptr;
  }

 private:
  double* seconds_;
  int64_t start_ = 0;
};

// Arguments of an exported function.
class Given {
 public:
  Given(const TVMFFIAny* values, int32_t count, int32_t expected) : values_(values) {
    if (count != expected) Refuse("expected %d arguments, got %d", expected, count);
  }
  const DLTensor* Tensor(int i) const {
    const TVMFFIAny& value = values_[i];
    if (value.type_index == kTVMFFINone) return nullptr;
    if (value.type_index == kTVMFFIDLTensorPtr) return static_cast<const DLTensor*>(value.v_ptr);
    if (value.type_index == kTVMFFITensor) return TVMFFITensorGetDLTensorPtr(value.v_obj);
    WrongKind(i, "a tensor");
  }
  int64_t Int(int i) const {
    if (values_[i].type_index != kTVMFFIInt) WrongKind(i, "an integer");
    return values_[i].v_int64;
  }
  // Data of a contiguous, aligned CPU tensor of this shape; null for None.
  template <typename Type>
  Type* Data(int i, const char* name, int bits, std::initializer_list<int64_t> shape, size_t alignment) const {
    return static_cast<Type*>(Memory(i, name, bits, shape, alignment));
  }

 private:
  void* Memory(int i, const char* name, int bits, std::initializer_list<int64_t> shape, size_t alignment) const {
    const DLTensor* t = Tensor(i);
    if (t == nullptr) return nullptr;
    if (t->device.device_type != kDLCPU) Refuse("%s must be on the CPU", name);
    if (t->dtype.bits != bits || t->dtype.lanes != 1) Refuse("%s must have elements of %d bits", name, bits);
    if (t->ndim != static_cast<int32_t>(shape.size())) Refuse("%s must have %d dimensions", name, static_cast<int>(shape.size()));
    bool empty = std::count(shape.begin(), shape.end(), 0) > 0;
    int64_t stride = 1;
    for (int d = t->ndim - 1; d >= 0; --d) {
      int64_t extent = shape.begin()[d];
      if (t->shape[d] != extent) Refuse("%s.shape[%d] is %ld, must be %ld", name, d, t->shape[d], extent);
      if (t->strides != nullptr && extent > 1 && !empty && t->strides[d] != stride) Refuse("%s must be contiguous", name);
      stride *= extent;
    }
    char* data = static_cast<char*>(t->data) + t->byte_offset;
    if (!empty && reinterpret_cast<uintptr_t>(data) % alignment != 0) {
      Refuse("%s must be aligned to %d bytes", name, static_cast<int>(alignment));
    }
    return data;
  }
  [[noreturn, gnu::cold, gnu::noinline]] static void WrongKind(int i, const char* kind) {
    Failure failure{"TypeError", {}};
    std::snprintf(failure.message, sizeof(failure.message), "argument %d must be %s", i, kind);
    throw failure;
  }
  const TVMFFIAny* values_;
};

// Runs `body(Given)`, whose integer result goes to the caller, and turns what it throws into a tvm-ffi error.
inline int Export(const TVMFFIAny* values, int32_t count, int32_t expected, TVMFFIAny* result, int64_t (*body)(const Given&)) {
  try {
    Given given(values, count, expected);
    int64_t value = body(given);
    *result = {};
    result->type_index = kTVMFFIInt;
    result->v_int64 = value;
    return 0;
  } catch (const Failure& failure) {
    if (failure.kind != nullptr) TVMFFIErrorSetRaisedFromCStr(failure.kind, failure.message);
    return -1;
  } catch (const std::bad_alloc&) {
    TVMFFIErrorSetRaisedFromCStr("MemoryError", "out of memory");
    return -1;
  } catch (const std::exception& error) {
    TVMFFIErrorSetRaisedFromCStr("RuntimeError", error.what());
    return -1;
  }
}

}  // namespace moegen
