// CUDA C as C++: what comes before the source of kernels that moegen/cuda/translation.py has rewritten.
//
// The launch, the fibers and the instructions are compiled beside it (launch.cc, scheduler.cc, matrix.cc, wgmma.cc, copies.cc,
// bulk.cc).
#pragma once
#include <assert.h>
#include <stddef.h>

#include <tuple>
#include <utility>

#include "intrinsics.h"
#include "ptx.h"

namespace emulator {

template <class T>
constexpr char KindOf() {
  if (std::is_pointer_v<T>) return 'p';
  if (std::is_integral_v<T> || std::is_enum_v<T>) return 'i';
  return std::is_floating_point_v<T> ? 'f' : 's';
}

template <class Function, Function* function>
struct Entry;

// Calls a kernel with arguments given by address, as cuLaunchKernel has them.
template <class... Parameters, void (*function)(Parameters...)>
struct Entry<void(Parameters...), function> {
  template <size_t... i>
  static void Apply(void* const* arguments, std::index_sequence<i...>) {
    (void)arguments;
    function(Load<std::remove_cv_t<Parameters>>(arguments[i])...);
  }
  template <class T>
  static T Load(const void* from) {  // which need not be aligned
    T value;
    memcpy(static_cast<void*>(&value), from, sizeof value);
    return value;
  }
  static void Call(void* const* arguments) { Apply(arguments, std::index_sequence_for<Parameters...>{}); }

  explicit Entry(const char* name, int index, unsigned max_threads) {
    static const Parameter parameters[] = {{static_cast<uint32_t>(sizeof(Parameters)), KindOf<std::remove_cv_t<Parameters>>()}...,
                                           {}};
    Register({name, Call, parameters, sizeof...(Parameters), max_threads, 0, index});
  }
};

template <class... Bounds>
constexpr unsigned First(unsigned bound, Bounds...) {
  return bound;
}

}  // namespace emulator

struct alignas(64) CUtensorMap {
  unsigned long long opaque[16];
};

#define MOEGEN_KERNEL(name, index, max_threads) \
  static const ::emulator::Entry<std::remove_pointer_t<decltype(&name)>, &name> moegen_entry_##index(#name, index, max_threads);

#define threadIdx (::emulator::current->thread)
#define blockIdx (::emulator::current->place->block)
#define blockDim (::emulator::current->place->size)
#define gridDim (::emulator::current->place->grid)

#define __syncthreads() ((void)::emulator::Synchronize(0, 0, __LINE__))
#define __syncthreads_count(value) \
  (static_cast<int>(::emulator::Synchronize(0, 0, __LINE__, true, ::emulator::Vote::kCount, (value) != 0)))
#define __syncthreads_and(value) \
  (static_cast<int>(::emulator::Synchronize(0, 0, __LINE__, true, ::emulator::Vote::kAnd, (value) != 0)))
#define __syncthreads_or(value) \
  (static_cast<int>(::emulator::Synchronize(0, 0, __LINE__, true, ::emulator::Vote::kOr, (value) != 0)))

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __managed__
#define __grid_constant__
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __maxnreg__(...)
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __align__(n) __attribute__((aligned(n)))
#define __builtin_align__(n) __attribute__((aligned(n)))
#define __restrict __restrict__
#define CUDART_INF_F __builtin_inff()
#define CUDART_NAN_F __builtin_nanf("")
