// float16 and bfloat16 as bits: conversions to and from float32, to nearest even as the device's.
#pragma once
#include <cstdint>
#include <cstring>

namespace emulator {

template <class To, class From>
inline To Bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "Bits changes the type of a value, not its size");
  To to;
  std::memcpy(static_cast<void*>(&to), static_cast<const void*>(&from), sizeof to);
  return to;
}

// Storage formats of 16 bits. NaN becomes 0x7fff, as the device's conversions have it.
struct Half {
  static float Widen(uint16_t bits) {
    uint32_t magnitude = static_cast<uint32_t>(bits & 0x7fff) << 13;
    uint32_t special = (bits & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u;
    uint32_t scaled = Bits<uint32_t>(Bits<float>(magnitude) * 0x1p112f);  // exponents move by 127 - 15; subnormals become normal
    return Bits<float>((scaled | special) | static_cast<uint32_t>(bits & 0x8000) << 16);
  }
  static uint16_t Narrow(float value) {
    uint32_t bits = Bits<uint32_t>(value), magnitude = bits & 0x7fffffff;
    uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
    if (magnitude > 0x7f800000) return 0x7fff;
    if (magnitude >= 0x47800000) return sign | 0x7c00;
    if (magnitude < 0x38800000) {  // subnormal: adding one half leaves steps of 2^-24
      return static_cast<uint16_t>(sign | (Bits<uint32_t>(Bits<float>(magnitude) + 0.5f) - 0x3f000000u));
    }
    return static_cast<uint16_t>(sign | ((magnitude + 0xc8000fffu + (magnitude >> 13 & 1)) >> 13));
  }
};

struct BFloat {
  static float Widen(uint16_t bits) { return Bits<float>(static_cast<uint32_t>(bits) << 16); }
  static uint16_t Narrow(float value) {
    uint32_t bits = Bits<uint32_t>(value);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
};

// The tensor cores read the upper 19 bits of a float32 operand of type tf32.
inline float TensorFloat(uint32_t bits) { return Bits<float>(bits & 0xffffe000u); }

// cvt.rna.tf32.f32: to nearest, ties away from zero.
inline uint32_t RoundedTensorFloat(float value) {
  uint32_t bits = Bits<uint32_t>(value);
  if ((bits & 0x7f800000) == 0x7f800000) return bits & 0x7fffff ? 0x7fffffff : bits;
  return (bits + 0x1000) & 0xffffe000u;
}

}  // namespace emulator
