// Exported functions that share the code which checks their arguments: tvm-ffi's macro writes it out for each argument of each.
#pragma once

#include <tvm/ffi/any.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/function.h>

#include <optional>
#include <string>
#include <type_traits>
#include <utility>

namespace moegen {

[[noreturn]] __attribute__((cold, noinline)) inline void Mistaken(const char* function, size_t index, const std::string& wanted, const std::string& given) {
  TVM_FFI_THROW(TypeError) << "argument " << index << " of " << function << " must be " << wanted << ", not " << given;
}

// Argument `index` of an exported function, as a T.
template <typename T>
__attribute__((noinline)) T Argument(const char* function, const tvm::ffi::AnyView* values, size_t index) {
  std::optional<T> value = values[index].try_cast<T>();
  if (!value.has_value()) Mistaken(function, index, tvm::ffi::TypeTraits<T>::TypeStr(), values[index].GetTypeKey());
  return *std::move(value);
}

template <typename Result, typename... Types, size_t... I>
void Call(Result (*function)(Types...), const char* name, const tvm::ffi::AnyView* values, tvm::ffi::Any* result, std::index_sequence<I...>) {
  if constexpr (std::is_void_v<Result>) {
    function(Argument<Types>(name, values, I)...);
  } else {
    *result = function(Argument<Types>(name, values, I)...);
  }
}

template <typename Result, typename... Types>
constexpr auto Indices(Result (*)(Types...)) {
  return std::index_sequence_for<Types...>();
}

// Runs the body of an exported function; what it throws becomes the caller's error.
__attribute__((noinline)) inline int Guarded(const char* name, size_t wanted, int32_t count, const TVMFFIAny* values, TVMFFIAny* result,
                                             void (*body)(const tvm::ffi::AnyView*, tvm::ffi::Any*)) {
  TVM_FFI_SAFE_CALL_BEGIN();
  if (static_cast<size_t>(count) != wanted) TVM_FFI_THROW(TypeError) << name << " takes " << wanted << " arguments, not " << count;
  body(reinterpret_cast<const tvm::ffi::AnyView*>(values), reinterpret_cast<tvm::ffi::Any*>(result));
  TVM_FFI_SAFE_CALL_END();
}

}  // namespace moegen

#define MOEGEN_EXPORT(name, function)                                                                                      \
  extern "C" TVM_FFI_DLL_EXPORT int __tvm_ffi_##name(void*, const TVMFFIAny* values, int32_t count, TVMFFIAny* result) {   \
    constexpr auto indices = moegen::Indices(function);                                                                    \
    return moegen::Guarded(#name, indices.size(), count, values, result, [](const tvm::ffi::AnyView* v, tvm::ffi::Any* r) { \
      moegen::Call(function, #name, v, r, indices);                                                                        \
    });                                                                                                                    \
  }
