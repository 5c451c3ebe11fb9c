// libcuda.so.1 without a device: the part of the driver's interface that compiled layers use, on top of emulated kernels.
//
// Machine code that is loaded is ignored; its kernels come from the libraries that $MOEGEN_EMULATED_KERNELS names meanwhile, parted by
// colons. Every call has done its work when it returns, whatever the stream. Other settings, all $MOEGEN_EMULATED_...: ARCH (sm_90
// when missing) is the device, SHARED_BYTES what its blocks may have of shared memory, THREADS how many threads run blocks, ORDER
// (ascending, descending, shuffled) and SEED in which order a block's threads run. Structures and numbers are those of the driver's
// interface.
#include <algorithm>
#include <chrono>

#include "driver_kernels.h"
#include "tensor_map.h"

using namespace emulator;

namespace {

using Pointer = uint64_t;  // CUdeviceptr

constexpr size_t kTotalMemory = size_t{80} << 30;
constexpr int kVersion = 13000;

// ---------------------------------------------------------------- devices

// Numbers of CUdevice_attribute -> what an H100 of the asked architecture says; others are 0.
Result DeviceAttribute(int* out, int attribute) {
  static const std::map<int, int> fixed = {
      {1, 1024},     {2, 1024},  {3, 1024},        {4, 64},     {5, 0x7fffffff}, {6, 65535}, {7, 65535}, {8, 48 << 10},
      {9, 64 << 10}, {10, 32},   {11, 0x7fffffff}, {12, 65536}, {13, 1980000},   {14, 512},  {15, 1},    {16, 132},
      {17, 0},       {18, 0},    {19, 1},          {20, 0},     {31, 1},         {32, 1},    {33, 1},    {34, 0},
      {36, 2619000}, {37, 5120}, {38, 50 << 20},   {39, 2048},  {40, 3},         {41, 1},    {50, 0},    {78, 1},
      {79, 1},       {80, 1},    {82, 65536},      {83, 1},     {90, 1},         {95, 1},    {106, 32},  {115, 1},
  };
  int capability = Capability();
  switch (attribute) {
    case 75: *out = capability / 10; return kSuccess;
    case 76: *out = capability % 10; return kSuccess;
    case 81: *out = OptInShared() + 1024; return kSuccess;
    case 97: *out = OptInShared(); return kSuccess;
    case 111: *out = 1024; return kSuccess;
    case 120: *out = capability >= 90; return kSuccess;
    default: break;
  }
  auto found = fixed.find(attribute);
  *out = found != fixed.end() ? found->second : 0;
  return attribute > 0 ? kSuccess : kInvalidValue;
}

int context;  // its address is the one context
thread_local void* current_context = nullptr;

// ---------------------------------------------------------------- copies

Result Copy(void* to, const void* from, size_t bytes, bool to_device, bool from_device) {
  auto outside = [bytes](const void* at) { return !Memory().Holds(reinterpret_cast<Pointer>(at), bytes); };
  if (to_device && outside(to))
    return Refuse(kInvalidValue, "a copy writes " + std::to_string(bytes) + " bytes that are no memory of the device");
  if (from_device && outside(from))
    return Refuse(kInvalidValue, "a copy reads " + std::to_string(bytes) + " bytes that are no memory of the device");
  std::memmove(to, from, bytes);
  return kSuccess;
}
void* At(Pointer address) { return reinterpret_cast<void*>(address); }

template <class Value>
Result Fill(Pointer to, Value value, size_t count) {
  if (!Memory().Holds(to, count * sizeof value)) {
    return Refuse(kInvalidValue,
                  "a fill writes " + std::to_string(count * sizeof value) + " bytes that are no memory of the device");
  }
  auto* at = static_cast<Value*>(At(to));
  for (size_t i = 0; i < count; ++i) at[i] = value;
  return kSuccess;
}

struct Side {
  size_t x, y;
  int memory;  // 1 host, 2 device, 4 unified
  int padding;
  void* host;
  Pointer device;
  void* array;
  size_t pitch;

  char* Row(size_t row) const { return static_cast<char*>(memory == 1 ? host : At(device)) + (y + row) * pitch + x; }
  bool OnDevice() const { return memory == 2; }
};
struct Copy2D {
  Side from, to;
  size_t width, height;
};

Result Copy(const Copy2D& copy) {
  if (copy.from.memory == 3 || copy.to.memory == 3) return Refuse(kNotSupported, "arrays of the device are not emulated");
  for (size_t row = 0; row < copy.height; ++row) {
    Result result = Copy(copy.to.Row(row), copy.from.Row(row), copy.width, copy.to.OnDevice(), copy.from.OnDevice());
    if (result != kSuccess) return result;
  }
  return kSuccess;
}

Result PointerAttribute(void* out, int attribute, Pointer address) {
  Pointer begin;
  size_t bytes;
  if (!Memory().Find(address, &begin, &bytes)) return kInvalidValue;
  switch (attribute) {
    case 1: *static_cast<void**>(out) = &context; return kSuccess;
    case 2: *static_cast<unsigned*>(out) = 2; return kSuccess;
    case 3: *static_cast<Pointer*>(out) = address; return kSuccess;
    case 8: *static_cast<unsigned*>(out) = 0; return kSuccess;
    case 9: *static_cast<int*>(out) = 0; return kSuccess;
    case 11: *static_cast<Pointer*>(out) = begin; return kSuccess;
    case 12: *static_cast<size_t*>(out) = bytes; return kSuccess;
    case 13: *static_cast<unsigned*>(out) = 1; return kSuccess;
    default: return kInvalidValue;
  }
}

using Clock = std::chrono::steady_clock;

}  // namespace

#define DRIVER extern "C" MOEGEN_EXPORT int

// ---------------------------------------------------------------- device and context

DRIVER cuInit(unsigned) { return kSuccess; }
DRIVER cuDriverGetVersion(int* version) { return Give(version, kVersion); }
DRIVER cuDeviceGetCount(int* count) { return Give(count, 1); }
DRIVER cuDeviceGet(int* device, int ordinal) { return ordinal == 0 ? Give(device, ordinal) : kInvalidDevice; }
DRIVER cuDeviceGetName(char* name, int length, int device) {
  std::snprintf(name, static_cast<size_t>(length), "emulated %s", Setting("MOEGEN_EMULATED_ARCH", "sm_90"));
  return device == 0 ? kSuccess : kInvalidDevice;
}
DRIVER cuDeviceGetAttribute(int* out, int attribute, int device) {
  return device == 0 ? DeviceAttribute(out, attribute) : kInvalidDevice;
}
DRIVER cuDeviceGetUuid(char* uuid, int) {
  std::memcpy(uuid, "moegen emulated", 16);
  return kSuccess;
}
DRIVER cuDeviceGetUuid_v2(char* uuid, int device) { return cuDeviceGetUuid(uuid, device); }
DRIVER cuDeviceTotalMem_v2(size_t* bytes, int) { return Give(bytes, kTotalMemory); }
DRIVER cuDeviceComputeCapability(int* major, int* minor, int) {
  Give(major, Capability() / 10);
  return Give(minor, Capability() % 10);
}
DRIVER cuDevicePrimaryCtxRetain(void** out, int) { return Give(out, &context); }
DRIVER cuDevicePrimaryCtxRelease_v2(int) { return kSuccess; }
DRIVER cuDevicePrimaryCtxGetState(int, unsigned* flags, int* active) {
  Give(flags, 0);
  return Give(active, 1);
}
DRIVER cuCtxGetCurrent(void** out) { return Give(out, current_context); }
DRIVER cuCtxSetCurrent(void* to) { return Give(&current_context, to); }
DRIVER cuCtxPushCurrent_v2(void* to) { return Give(&current_context, to); }
DRIVER cuCtxPopCurrent_v2(void** out) {
  if (out != nullptr) *out = current_context;
  return kSuccess;
}
DRIVER cuCtxGetDevice(int* device) { return Give(device, 0); }
DRIVER cuCtxSynchronize() {
  ++waits;
  return kSuccess;
}

DRIVER cuGetErrorName(int error, const char** out) {
  switch (error) {
    case kSuccess: *out = "CUDA_SUCCESS"; break;
    case kInvalidValue: *out = "CUDA_ERROR_INVALID_VALUE"; break;
    case kOutOfMemory: *out = "CUDA_ERROR_OUT_OF_MEMORY"; break;
    case kInvalidDevice: *out = "CUDA_ERROR_INVALID_DEVICE"; break;
    case kFileNotFound: *out = "CUDA_ERROR_FILE_NOT_FOUND"; break;
    case kInvalidHandle: *out = "CUDA_ERROR_INVALID_HANDLE"; break;
    case kNotFound: *out = "CUDA_ERROR_NOT_FOUND"; break;
    case kLaunchFailed: *out = "CUDA_ERROR_LAUNCH_FAILED"; break;
    case kNotSupported: *out = "CUDA_ERROR_NOT_SUPPORTED"; break;
    default: *out = "CUDA_ERROR_UNKNOWN"; break;
  }
  return kSuccess;
}
DRIVER cuGetErrorString(int error, const char** out) {
  if (error != kSuccess && !said.empty()) return Give(out, said.c_str());
  return cuGetErrorName(error, out);
}

// ---------------------------------------------------------------- kernels

DRIVER cuLibraryLoadData(void** out, const void*, void*, void**, unsigned, void*, void**, unsigned) {
  return Open(reinterpret_cast<Library**>(out));
}
DRIVER cuLibraryUnload(void*) { return kSuccess; }
DRIVER cuLibraryGetKernel(void** out, void* library, const char* name) { return FindFunction(out, library, name); }
DRIVER cuModuleLoadData(void** out, const void*) { return Open(reinterpret_cast<Library**>(out)); }
DRIVER cuModuleLoadDataEx(void** out, const void*, unsigned, void*, void**) { return Open(reinterpret_cast<Library**>(out)); }
DRIVER cuModuleUnload(void*) { return kSuccess; }
DRIVER cuModuleGetFunction(void** out, void* module, const char* name) { return FindFunction(out, module, name); }
DRIVER cuKernelGetFunction(void** out, void* kernel) { return Give(out, kernel); }
DRIVER cuKernelGetAttribute(int* out, int attribute, void* kernel, int) {
  return GetAttribute(out, attribute, static_cast<Function*>(kernel));
}
DRIVER cuKernelSetAttribute(int attribute, int value, void* kernel, int) {
  return SetAttribute(static_cast<Function*>(kernel), attribute, value);
}
DRIVER cuFuncGetAttribute(int* out, int attribute, void* function) {
  return GetAttribute(out, attribute, static_cast<Function*>(function));
}
DRIVER cuFuncSetAttribute(void* function, int attribute, int value) {
  return SetAttribute(static_cast<Function*>(function), attribute, value);
}
DRIVER cuFuncSetCacheConfig(void*, int) { return kSuccess; }

DRIVER cuOccupancyMaxActiveBlocksPerMultiprocessor(int* out, void* function, int threads, size_t dynamic) {
  if (function == nullptr || threads <= 0) return kInvalidValue;
  int shared = static_cast<int>(dynamic) + static_cast<Function*>(function)->static_shared + 1024;
  int warps = (threads + 31) / 32;
  return Give(out, std::min({64 / warps, 32, (OptInShared() + 1024) / shared}));
}

DRIVER cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared,
                      void*, void** parameters, void** extra) {
  return Launch(static_cast<Function*>(function), {gx, gy, gz}, {bx, by, bz}, shared, parameters, extra);
}

struct Attribute {
  int id, padding;
  unsigned value[16];
};
struct Configuration {
  unsigned grid[3], block[3], shared;
  void* stream;
  const Attribute* attributes;
  unsigned count;
};

DRIVER cuLaunchKernelEx(const Configuration* configuration, void* function, void** parameters, void** extra) {
  for (unsigned i = 0; i < configuration->count; ++i) {
    const Attribute& attribute = configuration->attributes[i];
    if (attribute.id == 4 && attribute.value[0] * attribute.value[1] * attribute.value[2] != 1) {
      return Refuse(kNotSupported, "clusters of more than one block are not emulated");
    }
  }
  return Launch(static_cast<Function*>(function), configuration->grid, configuration->block, configuration->shared, parameters,
                extra);
}

// ---------------------------------------------------------------- memory

DRIVER cuMemAlloc_v2(Pointer* out, size_t bytes) {
  if (bytes == 0) return kInvalidValue;
  return (*out = Memory().Give(bytes)) != 0 ? kSuccess : kOutOfMemory;
}
DRIVER cuMemAllocAsync(Pointer* out, size_t bytes, void*) { return cuMemAlloc_v2(out, bytes); }
DRIVER cuMemFree_v2(Pointer address) {
  if (address == 0 || Memory().Take(address)) return kSuccess;
  return Refuse(kInvalidValue, "memory is freed that was not given, or twice");
}
DRIVER cuMemFreeAsync(Pointer address, void*) { return cuMemFree_v2(address); }
DRIVER cuMemAllocHost_v2(void** out, size_t bytes) { return (*out = std::malloc(bytes)) != nullptr ? kSuccess : kOutOfMemory; }
DRIVER cuMemHostAlloc(void** out, size_t bytes, unsigned) { return cuMemAllocHost_v2(out, bytes); }
DRIVER cuMemFreeHost(void* at) {
  std::free(at);
  return kSuccess;
}
DRIVER cuMemHostRegister_v2(void*, size_t, unsigned) { return kSuccess; }
DRIVER cuMemHostUnregister(void*) { return kSuccess; }
DRIVER cuMemGetInfo_v2(size_t* free, size_t* total) {
  Give(total, kTotalMemory);
  return Give(free, kTotalMemory - Memory().total());
}
DRIVER cuMemGetAddressRange_v2(Pointer* begin, size_t* bytes, Pointer address) {
  return Memory().Find(address, begin, bytes) ? kSuccess : kNotFound;
}
DRIVER cuPointerGetAttribute(void* out, int attribute, Pointer address) { return PointerAttribute(out, attribute, address); }
DRIVER cuPointerGetAttributes(unsigned count, const int* attributes, void** out, Pointer address) {
  for (unsigned i = 0; i < count; ++i) {
    if (PointerAttribute(out[i], attributes[i], address) != kSuccess) *static_cast<unsigned*>(out[i]) = 0;  // host memory
  }
  return kSuccess;
}

DRIVER cuMemcpyHtoD_v2(Pointer to, const void* from, size_t bytes) { return Copy(At(to), from, bytes, true, false); }
DRIVER cuMemcpyDtoH_v2(void* to, Pointer from, size_t bytes) { return Copy(to, At(from), bytes, false, true); }
DRIVER cuMemcpyDtoD_v2(Pointer to, Pointer from, size_t bytes) { return Copy(At(to), At(from), bytes, true, true); }
DRIVER cuMemcpy(Pointer to, Pointer from, size_t bytes) { return Copy(At(to), At(from), bytes, false, false); }
DRIVER cuMemcpyHtoDAsync_v2(Pointer to, const void* from, size_t bytes, void*) { return Copy(At(to), from, bytes, true, false); }
DRIVER cuMemcpyDtoHAsync_v2(void* to, Pointer from, size_t bytes, void*) { return Copy(to, At(from), bytes, false, true); }
DRIVER cuMemcpyDtoDAsync_v2(Pointer to, Pointer from, size_t bytes, void*) { return Copy(At(to), At(from), bytes, true, true); }
DRIVER cuMemcpyAsync(Pointer to, Pointer from, size_t bytes, void*) { return Copy(At(to), At(from), bytes, false, false); }
DRIVER cuMemcpy2D_v2(const Copy2D* copy) { return Copy(*copy); }
DRIVER cuMemcpy2DUnaligned_v2(const Copy2D* copy) { return Copy(*copy); }
DRIVER cuMemcpy2DAsync_v2(const Copy2D* copy, void*) { return Copy(*copy); }
DRIVER cuMemsetD8_v2(Pointer to, unsigned char value, size_t count) { return Fill(to, value, count); }
DRIVER cuMemsetD16_v2(Pointer to, unsigned short value, size_t count) { return Fill(to, value, count); }
DRIVER cuMemsetD32_v2(Pointer to, unsigned value, size_t count) { return Fill(to, value, count); }
DRIVER cuMemsetD8Async(Pointer to, unsigned char value, size_t count, void*) { return Fill(to, value, count); }
DRIVER cuMemsetD16Async(Pointer to, unsigned short value, size_t count, void*) { return Fill(to, value, count); }
DRIVER cuMemsetD32Async(Pointer to, unsigned value, size_t count, void*) { return Fill(to, value, count); }

DRIVER cuTensorMapEncodeTiled(void* out, int type, uint32_t rank, void* address, const uint64_t* dims, const uint64_t* strides,
                              const uint32_t* box, const uint32_t* steps, int interleave, int swizzle, int, int fill) {
  auto at = reinterpret_cast<uint64_t>(address);
  std::string refusal = EncodeTensorMap({type, rank, at, dims, strides, box, steps, interleave, swizzle, fill}, out);
  return refusal.empty() ? kSuccess : Refuse(kInvalidValue, refusal);
}

// ---------------------------------------------------------------- streams and events

DRIVER cuStreamCreate(void** out, unsigned) { return Give(out, new int); }
DRIVER cuStreamCreateWithPriority(void** out, unsigned flags, int) { return cuStreamCreate(out, flags); }
DRIVER cuStreamDestroy_v2(void* stream) {
  delete static_cast<int*>(stream);
  return kSuccess;
}
DRIVER cuStreamSynchronize(void*) {
  ++waits;
  return kSuccess;
}
DRIVER cuStreamQuery(void*) { return kSuccess; }
DRIVER cuStreamWaitEvent(void*, void*, unsigned) { return kSuccess; }
DRIVER cuStreamIsCapturing(void*, int* status) { return Give(status, 0); }
DRIVER cuEventCreate(void** out, unsigned) { return Give(out, new Clock::time_point); }
DRIVER cuEventDestroy_v2(void* event) {
  delete static_cast<Clock::time_point*>(event);
  return kSuccess;
}
DRIVER cuEventRecord(void* event, void*) { return Give(static_cast<Clock::time_point*>(event), Clock::now()); }
DRIVER cuEventQuery(void*) { return kSuccess; }
DRIVER cuEventSynchronize(void*) { return kSuccess; }
DRIVER cuEventElapsedTime(float* ms, void* begin, void* end) {
  auto spent = *static_cast<Clock::time_point*>(end) - *static_cast<Clock::time_point*>(begin);
  return Give(ms, std::chrono::duration<float, std::milli>(spent).count());
}
DRIVER cuEventElapsedTime_v2(float* ms, void* begin, void* end) { return cuEventElapsedTime(ms, begin, end); }

// ---------------------------------------------------------------- functions by name

DRIVER cuGetProcAddress_v2(const char* symbol, void** out, int, uint64_t, int* status) {
  Dl_info mine;
  dladdr(reinterpret_cast<void*>(&cuInit), &mine);
  void* self = dlopen(mine.dli_fname, RTLD_NOW | RTLD_NOLOAD);
  std::string name = symbol;
  *out = dlsym(self, (name + "_v2").c_str());
  if (*out == nullptr) *out = dlsym(self, symbol);
  if (status != nullptr) *status = *out != nullptr ? 0 : 1;
  return *out != nullptr ? kSuccess : kNotFound;
}
DRIVER cuGetProcAddress(const char* symbol, void** out, int version, uint64_t flags) {
  return cuGetProcAddress_v2(symbol, out, version, flags, nullptr);
}

// ---------------------------------------------------------------- of the emulator alone

extern "C" MOEGEN_EXPORT long moegen_emulated_launches() { return launches; }
extern "C" MOEGEN_EXPORT long moegen_emulated_waits() { return waits; }
