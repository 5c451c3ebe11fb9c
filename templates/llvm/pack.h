// Packing weights [n, k] of any strides into panels [n / columns][k_padded / pair][2][lanes][pair], zero-padded. Codes of four bits come
// as a byte each; eight terms of a column make a word of 32 bits, or where terms go in pairs, two words of 16.
#pragma once
#include "stage.h"

namespace moegen {

struct Segment {
  int64_t offset_bytes;
  int bits;       // of an element that is given
  int64_t count;  // experts
  int64_t n, panels, k, k_padded, lanes, pair;
  bool gated;  // two sources: vector 0 of a panel from the gate, vector 1 from the up projection
  bool nibbles;     // four bits of each element are stored,
  uint8_t flipped;  // these of them inverted

  int64_t panel_bytes() const { return k_padded * 2 * lanes * bits / (nibbles ? 16 : 8); }
};

// A source matrix [n, k] or, for biases (k = 1), a vector [n].
struct Source {
  const char* data;
  int64_t n_stride, k_stride;
};

inline Source SourceOf(const DLTensor* t, const Segment& s, const char* name) {
  if (t == nullptr) Refuse("%s is missing", name);
  bool vector = s.k == 1 && t->ndim == 1;
  if (t->device.device_type != kDLCPU || t->dtype.bits != s.bits || (!vector && t->ndim != 2)) {
    Refuse("%s must be a CPU matrix of %d-bit elements", name, s.bits);
  }
  if (t->shape[0] != s.n || (!vector && t->shape[1] != s.k)) Refuse("%s must have shape [%ld, %ld]", name, s.n, s.k);
  int64_t n_stride = t->strides != nullptr ? t->strides[0] : (vector ? 1 : s.k);
  int64_t k_stride = vector ? 0 : (t->strides != nullptr ? t->strides[1] : 1);
  return {static_cast<const char*>(t->data) + t->byte_offset, n_stride, k_stride};
}

template <typename Element>
void PackPanel(const Segment& s, const Source* sources, Element* out, int64_t panel) {
  constexpr int64_t kBlock = 64;  // terms of the dot product at a time: one page of output, whole cache lines of input
  int64_t columns = s.gated ? s.lanes : 2 * s.lanes;
  for (int64_t k0 = 0; k0 < s.k_padded; k0 += kBlock) {
    int64_t k1 = std::min(k0 + kBlock, s.k_padded), filled = std::min(k1, s.k);
    for (int64_t slot = 0; slot < 2 * s.lanes; ++slot) {
      const Source& source = sources[s.gated ? slot / s.lanes : 0];
      int64_t row = panel * columns + (s.gated ? slot % s.lanes : slot);
      Element* to = out + slot * s.pair;
      auto at = [&s](int64_t k) { return k / s.pair * s.pair * 2 * s.lanes + k % s.pair; };
      int64_t k = k0;
      if (row < s.n) {
        const Element* from = reinterpret_cast<const Element*>(source.data) + row * source.n_stride;
        for (; k < filled; ++k) to[at(k)] = from[k * source.k_stride];
      }
      for (; k < k1; ++k) to[at(k)] = 0;
    }
  }
}

inline void PackNibbles(const Segment& s, const Source* sources, uint8_t* out, int64_t panel) {
  int64_t columns = s.gated ? s.lanes : 2 * s.lanes;
  std::memset(out, s.flipped * 0x11, s.panel_bytes());
  for (int64_t slot = 0; slot < 2 * s.lanes; ++slot) {
    const Source& source = sources[s.gated ? slot / s.lanes : 0];
    int64_t row = panel * columns + (s.gated ? slot % s.lanes : slot);
    if (row >= s.n) continue;
    const uint8_t* from = reinterpret_cast<const uint8_t*>(source.data) + row * source.n_stride;
    for (int64_t k = 0; k < s.k; ++k) {
      int64_t in_word = k % 8 / s.pair, word = ((k / 8) * 2 * s.lanes + slot) * s.pair + k % s.pair;
      uint8_t& byte = out[word * (4 / s.pair) + in_word / 2];
      int shift = in_word % 2 * 4;
      byte = static_cast<uint8_t>((byte & ~(15 << shift)) | (((from[k * source.k_stride] ^ s.flipped) & 15) << shift));
    }
  }
}

struct PackJob {
  const Segment* segment;
  Source sources[2];
  char* out;
};

inline int PackTask(int task, Env* env, void* closure) {
  const PackJob& job = *static_cast<PackJob*>(closure);
  const Segment& s = *job.segment;
  for (int64_t panel = task; panel < s.panels; panel += env->num_task) {
    char* out = job.out + panel * s.panel_bytes();
    if (s.nibbles) {
      PackNibbles(s, job.sources, reinterpret_cast<uint8_t*>(out), panel);
    } else if (s.bits == 32) {
      PackPanel(s, job.sources, reinterpret_cast<uint32_t*>(out), panel);
    } else if (s.bits == 16) {
      PackPanel(s, job.sources, reinterpret_cast<uint16_t*>(out), panel);
    } else {
      PackPanel(s, job.sources, reinterpret_cast<uint8_t*>(out), panel);
    }
  }
  return 0;
}

// Packs the weights of one expert into segment `s` of the blob.
inline void Pack(const Segment& s, char* blob, int64_t expert, const DLTensor* first, const DLTensor* second) {
  if (expert < 0 || expert >= s.count) Refuse("expert must be between 0 and %ld", s.count - 1);
  PackJob job{&s, {}, nullptr};
  job.sources[0] = SourceOf(first, s, s.gated ? "gate" : "weight");
  if (s.gated) job.sources[1] = SourceOf(second, s, "up");
  job.out = blob + s.offset_bytes + expert * s.panels * s.panel_bytes();
  Launch(PackTask, &job, Tasks(s.panels, 4.0 * s.panels * s.k_padded * 2 * s.lanes));
}

}  // namespace moegen
