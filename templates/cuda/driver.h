// NVIDIA's driver, found when it is first wanted: a library that is loaded where there is none can still be asked what it is.

#pragma once

#include <cuda.h>
#include <dlfcn.h>

namespace moegen {

// A function of libcuda.so.1 by name; nullptr where there is no driver, or an older one.
inline void* Driver(const char* name) {
  static void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_GLOBAL);
  return library == nullptr ? nullptr : dlsym(library, name);
}

}  // namespace moegen

#define MOEGEN_TEXT(name) #name
// The function under the name that cuda.h gives it (cuMemAlloc is cuMemAlloc_v2), handing over to the driver's own.
#define MOEGEN_FORWARD(name, parameters, arguments)                                           \
  extern "C" CUresult CUDAAPI name parameters {                                               \
    static auto real = reinterpret_cast<CUresult(CUDAAPI*) parameters>(moegen::Driver(MOEGEN_TEXT(name))); \
    return real == nullptr ? CUDA_ERROR_NO_DEVICE : real arguments;                           \
  }

MOEGEN_FORWARD(cuInit, (unsigned flags), (flags))
MOEGEN_FORWARD(cuDeviceGet, (CUdevice * device, int ordinal), (device, ordinal))
MOEGEN_FORWARD(cuDeviceGetCount, (int* count), (count))
MOEGEN_FORWARD(cuDeviceGetAttribute, (int* value, CUdevice_attribute attribute, CUdevice device), (value, attribute, device))
MOEGEN_FORWARD(cuDevicePrimaryCtxRetain, (CUcontext * context, CUdevice device), (context, device))
MOEGEN_FORWARD(cuCtxGetCurrent, (CUcontext * context), (context))
MOEGEN_FORWARD(cuCtxSetCurrent, (CUcontext context), (context))
MOEGEN_FORWARD(cuCtxGetDevice, (CUdevice * device), (device))
MOEGEN_FORWARD(cuLibraryLoadData,
               (CUlibrary * library, const void* code, CUjit_option* jit, void** jit_values, unsigned jits, CUlibraryOption* options,
                void** values, unsigned count),
               (library, code, jit, jit_values, jits, options, values, count))
MOEGEN_FORWARD(cuLibraryUnload, (CUlibrary library), (library))
MOEGEN_FORWARD(cuLibraryGetKernel, (CUkernel * kernel, CUlibrary library, const char* name), (kernel, library, name))
MOEGEN_FORWARD(cuKernelGetAttribute, (int* value, CUfunction_attribute attribute, CUkernel kernel, CUdevice device),
               (value, attribute, kernel, device))
MOEGEN_FORWARD(cuKernelSetAttribute, (CUfunction_attribute attribute, int value, CUkernel kernel, CUdevice device),
               (attribute, value, kernel, device))
MOEGEN_FORWARD(cuLaunchKernel,
               (CUfunction function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared,
                CUstream stream, void** parameters, void** extra),
               (function, gx, gy, gz, bx, by, bz, shared, stream, parameters, extra))
MOEGEN_FORWARD(cuLaunchKernelEx, (const CUlaunchConfig* config, CUfunction function, void** parameters, void** extra),
               (config, function, parameters, extra))
MOEGEN_FORWARD(cuMemAlloc, (CUdeviceptr * pointer, size_t bytes), (pointer, bytes))
MOEGEN_FORWARD(cuMemFree, (CUdeviceptr pointer), (pointer))
MOEGEN_FORWARD(cuMemcpyAsync, (CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream), (to, from, bytes, stream))
MOEGEN_FORWARD(cuMemcpy2DAsync, (const CUDA_MEMCPY2D* copy, CUstream stream), (copy, stream))
MOEGEN_FORWARD(cuMemsetD8Async, (CUdeviceptr to, unsigned char value, size_t bytes, CUstream stream), (to, value, bytes, stream))
MOEGEN_FORWARD(cuTensorMapEncodeTiled,
               (CUtensorMap * map, CUtensorMapDataType type, cuuint32_t rank, void* base, const cuuint64_t* dims, const cuuint64_t* strides,
                const cuuint32_t* box, const cuuint32_t* steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill),
               (map, type, rank, base, dims, strides, box, steps, interleave, swizzle, promotion, fill))
MOEGEN_FORWARD(cuStreamSynchronize, (CUstream stream), (stream))
MOEGEN_FORWARD(cuEventCreate, (CUevent * event, unsigned flags), (event, flags))
MOEGEN_FORWARD(cuEventRecord, (CUevent event, CUstream stream), (event, stream))
MOEGEN_FORWARD(cuEventSynchronize, (CUevent event), (event))
MOEGEN_FORWARD(cuEventElapsedTime, (float* ms, CUevent begin, CUevent end), (ms, begin, end))
MOEGEN_FORWARD(cuEventDestroy, (CUevent event), (event))

// What the launcher says of errors, which it may have to where there is no driver to ask.
extern "C" CUresult CUDAAPI cuGetErrorName(CUresult error, const char** text) {
  static auto real = reinterpret_cast<CUresult(CUDAAPI*)(CUresult, const char**)>(moegen::Driver("cuGetErrorName"));
  *text = "no driver";
  return real == nullptr ? CUDA_SUCCESS : real(error, text);
}
extern "C" CUresult CUDAAPI cuGetErrorString(CUresult error, const char** text) {
  static auto real = reinterpret_cast<CUresult(CUDAAPI*)(CUresult, const char**)>(moegen::Driver("cuGetErrorString"));
  *text = "libcuda.so.1 is not there";
  return real == nullptr ? CUDA_SUCCESS : real(error, text);
}
