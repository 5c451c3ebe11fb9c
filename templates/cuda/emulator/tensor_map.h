// A tensor map: what cuTensorMapEncodeTiled was asked for, in the 128 bytes of a CUtensorMap.
//
// The device's own encoding is not public; what is checked when one is made is what the driver's manual demands.
#pragma once
#include <cstdint>
#include <cstring>
#include <string>

namespace emulator {

constexpr uint32_t kTensorMapMark = 0x6d6f6567;

struct TensorMap {
  uint32_t mark;
  uint8_t rank, element_bytes, swizzle, fill_with_nan;  // swizzle: log2 of its 16-byte chunks: 0, 1, 2, 3
  uint64_t address;
  uint32_t last[5];    // largest index of each dimension, the innermost first
  uint64_t stride[4];  // bytes between neighbours in every dimension but the innermost
  uint16_t box[5];
  uint8_t step[5];  // elementStrides
};
static_assert(sizeof(TensorMap) <= 128);

struct TensorMapRequest {
  int type;
  uint32_t rank;
  uint64_t address;
  const uint64_t *dims, *strides;
  const uint32_t *box, *steps;
  int interleave, swizzle, fill;
};

// Why a tensor map cannot be made; empty when it has been.
inline std::string EncodeTensorMap(const TensorMapRequest& asked, void* out) {
  static const uint8_t kBytes[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};
  auto said = [](const std::string& what, uint64_t value, const std::string& limit) {
    return "a tensor map's " + what + " is " + std::to_string(value) + ", " + limit;
  };
  if (asked.type < 0 || asked.type >= static_cast<int>(sizeof kBytes))
    return said("data type", static_cast<uint64_t>(asked.type), "which is not emulated");
  if (asked.rank < 1 || asked.rank > 5) return said("rank", asked.rank, "it has to be 1 to 5");
  if (asked.interleave != 0) return "interleaved tensor maps are not emulated";
  if (asked.swizzle < 0 || asked.swizzle > 3) return said("swizzle", static_cast<uint64_t>(asked.swizzle), "which is not emulated");
  if (asked.address % 16 != 0) return said("address", asked.address, "which is not a multiple of 16");
  TensorMap map{};
  map.mark = kTensorMapMark;
  map.rank = static_cast<uint8_t>(asked.rank);
  map.element_bytes = kBytes[asked.type];
  map.swizzle = static_cast<uint8_t>(asked.swizzle);
  map.fill_with_nan = asked.fill != 0;
  map.address = asked.address;
  for (uint32_t d = 0; d < asked.rank; ++d) {
    const std::string which = " " + std::to_string(d);
    if (asked.dims[d] < 1 || asked.dims[d] > uint64_t{1} << 32)
      return said("dimension" + which, asked.dims[d], "it has to be 1 to 2^32");
    if (asked.box[d] < 1 || asked.box[d] > 256) return said("box size" + which, asked.box[d], "it has to be 1 to 256");
    if (asked.steps[d] < 1 || asked.steps[d] > 8) return said("element stride" + which, asked.steps[d], "it has to be 1 to 8");
    if (asked.steps[d] != 1) return "element strides other than 1 are not emulated";
    map.last[d] = static_cast<uint32_t>(asked.dims[d] - 1);
    map.box[d] = static_cast<uint16_t>(asked.box[d]);
    map.step[d] = static_cast<uint8_t>(asked.steps[d]);
    if (d + 1 == asked.rank) continue;
    uint64_t stride = asked.strides[d];
    if (stride % 16 != 0 || stride >= uint64_t{1} << 40)
      return said("stride" + which, stride, "it has to be a multiple of 16 below 2^40");
    map.stride[d] = stride;
  }
  uint64_t row = uint64_t{map.box[0]} * map.element_bytes, span = 16u << map.swizzle;
  if (row % 16 != 0) return said("box row in bytes", row, "which is not a multiple of 16");
  if (map.swizzle != 0 && row > span) return said("box row in bytes", row, "and its swizzle takes at most " + std::to_string(span));
  std::memset(out, 0, 128);
  std::memcpy(out, &map, sizeof map);
  return "";
}

// Where a swizzle puts the byte at an address: the 16-byte chunk's number is mixed with the row's.
inline uint32_t Swizzled(uint32_t address, unsigned swizzle) {
  uint32_t chunks = (1u << swizzle) - 1;
  return address ^ ((address >> 7 & chunks) << 4);
}

}  // namespace emulator
