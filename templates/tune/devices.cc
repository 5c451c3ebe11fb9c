// What a server that measures on its CUDA device does beside TVM's own RPC; remote.h says how.
//
// Only children open the device, so that what becomes of it there ends with them: CUDA takes no fork of a process that has it open.
// A child copies the session's packed weights to the device, and has the layers' own functions do all the rest.
#include "remote.h"

#include <memory>

namespace {

constexpr double kMostCalls = 4096;  // of a turn: what ends sooner is a toy
constexpr int kNameBytes = 256;

// A function of tvm-ffi's registry.
TVMFFIAny CallGlobal(const char* name, std::vector<TVMFFIAny> arguments) {
  TVMFFIByteArray key{name, strlen(name)};
  TVMFFIObjectHandle function = nullptr;
  if (Ffi<int (*)(const TVMFFIByteArray*, TVMFFIObjectHandle*)>("TVMFFIFunctionGetGlobal")(&key, &function) != 0) Raised();
  if (function == nullptr) throw Failure{std::string("tvm-ffi has no function ") + name};
  TVMFFIAny result{};
  auto call = Ffi<int (*)(TVMFFIObjectHandle, TVMFFIAny*, int32_t, TVMFFIAny*)>("TVMFFIFunctionCall");
  if (call(function, arguments.data(), static_cast<int32_t>(arguments.size()), &result) != 0) Raised();
  return result;
}

// A compiled layer in a child, opened on the device; the child's end is its end.
class Layer {
 public:
  explicit Layer(int64_t which) : library_(which) {
    if (Call(library_.Find("device_count"), {}).v_int64 < 1) throw Failure{"there is no CUDA device any more"};
    Call(library_.Find("prepare"), {Int(0)});
    time_ = library_.Find("time");
  }

  TVMFFIAny Empty(std::vector<int64_t> shape, DLDataType dtype) {
    std::vector<TVMFFIAny> extents;
    for (int64_t extent : shape) extents.push_back(Int(extent));
    TVMFFIAny type{};
    type.type_index = kTVMFFIDataType;
    type.v_dtype = dtype;
    return Call(library_.Find("empty"), {CallGlobal("ffi.Shape", extents), type, Int(0)});
  }
  void Copy(TVMFFIAny to, TVMFFIAny from) { Call(library_.Find("copy"), {to, from, Int(0)}); }
  int64_t WorkspaceBytes(int64_t tokens) { return Call(library_.Find("workspace_bytes"), {Int(tokens)}).v_int64; }

  // Seconds of a call, by the device's own events around so many, from batch and copy `first` on.
  double Seconds(TVMFFIAny xs, TVMFFIAny out, TVMFFIAny weights, TVMFFIAny workspace, int64_t first, int64_t calls) {
    return Call(time_, {xs, out, weights, workspace, Int(first), Int(calls)}).v_float64;
  }

 private:
  Library library_;
  Function time_;
};

// Both layers on packed weights in the device's memory. The default's functions look after that memory.
class Bench {
 public:
  Bench(const DLTensor& x, const std::vector<DLTensor>& weights, int64_t) : x_(x), given_(weights) {
    if (x_.dtype.code == kDLUInt) x_.dtype.code = kDLBfloat;  // which NumPy has not: moegen.arrays
  }

  void Open(int64_t library) {
    layers_[library] = std::make_unique<Layer>(library);
    if (library == 0) Upload();
    workspaces_[library] = layers_[0]->Empty({layers_[library]->WorkspaceBytes(x_.shape[1])}, {kDLUInt, 8, 1});
  }

  const char* Answer(int64_t library, int64_t batch, double& seconds) {
    memset(host_.data(), 0xFF, host_.size());
    DLTensor host = Host(host_.data());
    layers_[0]->Copy(out_, Tensor(host));
    seconds = Seconds(library, batch, 1);
    layers_[0]->Copy(Tensor(host), out_);
    return host_.data();
  }

  // The mean call of a turn, after one in which the clocks go up and the other library's code leaves the cache.
  double Turn(int64_t library, int64_t round, double turn_seconds) {
    if (calls_ == 0) {
      const double typical = std::min(Seconds(0, 0, x_.shape[0]), Seconds(1, 0, x_.shape[0]));
      calls_ = std::max(1.0, std::ceil(turn_seconds / std::max(typical, turn_seconds / kMostCalls)));
    }
    Seconds(library, round * calls_ + period_ - 1, 1);
    return Seconds(library, round * calls_, calls_);
  }

 private:
  void Upload() {
    Layer& layer = *layers_[0];
    std::vector<TVMFFIAny> xs, blobs;
    for (int64_t b = 0; b < x_.shape[0]; ++b) {
      DLTensor host = Host(Data(x_) + b * (Bytes(x_) / x_.shape[0]));
      xs.push_back(layer.Empty({host.shape[0], host.shape[1]}, host.dtype));
      layer.Copy(xs.back(), Tensor(host));
    }
    for (DLTensor& weights : given_) {
      blobs.push_back(layer.Empty({Bytes(weights)}, {kDLUInt, 8, 1}));
      layer.Copy(blobs.back(), Tensor(weights));
    }
    out_ = layer.Empty({x_.shape[1], x_.shape[2]}, x_.dtype);
    host_.resize(Bytes(x_) / x_.shape[0]);
    xs_ = CallGlobal("ffi.Array", xs);
    weights_ = CallGlobal("ffi.Array", blobs);
    for (period_ = xs.size(); period_ % static_cast<int64_t>(blobs.size()) != 0;) period_ += xs.size();
  }

  // One batch in host memory.
  DLTensor Host(void* data) { return {data, {kDLCPU, 0}, 2, x_.dtype, x_.shape + 1, nullptr, 0}; }

  double Seconds(int64_t library, int64_t first, int64_t calls) {
    return layers_[library]->Seconds(xs_, out_, weights_, workspaces_[library], first % period_, calls);
  }

  DLTensor x_;
  std::vector<DLTensor> given_;
  std::vector<char> host_;
  TVMFFIAny xs_{}, weights_{}, out_{}, workspaces_[2]{};
  int64_t period_ = 1, calls_ = 0;
  std::unique_ptr<Layer> layers_[2];
};

// ---------------------------------------------------------------- the machine

// A function of NVIDIA's driver, called; it answers 0.
template <typename... Arguments>
void Ask(const char* name, Arguments... arguments) {
  static void* driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_GLOBAL);
  if (driver == nullptr) throw Failure{"there is no libcuda.so.1, which comes with NVIDIA's driver"};
  auto function = reinterpret_cast<int (*)(Arguments...)>(dlsym(driver, name));
  if (function == nullptr) throw Failure{std::string("NVIDIA's driver has no ") + name};
  const int error = function(arguments...);
  if (error == 0) return;
  const char* text = nullptr;
  auto named = reinterpret_cast<int (*)(int, const char**)>(dlsym(driver, "cuGetErrorName"));
  if (named == nullptr || named(error, &text) != 0 || text == nullptr) text = "an unknown error";
  throw Failure{std::string(name) + " says " + text};
}

std::string Described() {
  // Numbers of cuda.h's CUdevice_attribute.
  constexpr struct {
    const char* field;
    int attribute;
  } kAttributes[] = {{"multiprocessors", 16}, {"clock_khz", 13}, {"memory_clock_khz", 36}, {"l2_bytes", 38}, {"major", 75}, {"minor", 76}};
  int count = 0, device = 0, driver = 0;
  size_t memory = 0;
  char name[kNameBytes] = {};
  Ask("cuInit", 0u);
  Ask("cuDeviceGetCount", &count);
  if (count < 1) throw Failure{"NVIDIA's driver finds none"};
  Ask("cuDeviceGet", &device, 0);
  Ask("cuDeviceGetName", static_cast<char*>(name), kNameBytes, device);
  Ask("cuDeviceTotalMem_v2", &memory, device);
  Ask("cuDriverGetVersion", &driver);
  std::string text = std::string("name : ") + name + "\nmemory_bytes : " + std::to_string(memory) + "\ndriver : " + std::to_string(driver) + "\n";
  for (const auto& [field, attribute] : kAttributes) {
    int value = 0;
    Ask("cuDeviceGetAttribute", &value, attribute, device);
    text += std::string(field) + " : " + std::to_string(value) + "\n";
  }
  return text;
}

// machine(text, limit_s, said uint8 [512]): lines `field : value` that describe the first device.
int64_t Machine(const Given& given) {
  DLTensor text = given.Tensor(0);
  Shared<char> found(Bytes(text));
  int64_t ending = InChild(given.Float(1), given.Tensor(2), [&](int64_t&) {
    DLTensor to = text;
    to.data = found.data();
    to.byte_offset = 0;
    Fill(to, Described());
  });
  found.CopyTo(text);
  return ending;
}

}  // namespace

REMOTE_EXPORT(machine, Machine)
REMOTE_EXPORT(answers, Answers<Bench>)
REMOTE_EXPORT(times, Times<Bench>)
