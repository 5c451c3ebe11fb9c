// What the kernels of a layer are made of beside TVM's own code: leaving early, and products on tensor cores.
//
// A thread's sums are sums[row][part][column] of `2 * kRowTiles` rows and `2 * kColumnTiles` columns that are neighbours. Of fragment i of 16
// rows it has rows 2i and 2i + 1, of fragment j of 8 columns the columns 2j and 2j + 1 (PTX ISA, m16n8k16: lane / 4 is the row of a
// fragment's halves, lane % 4 the pair of columns). In shared memory the rows of a fragment lie one after another, and of 16 bytes of a row
// the place is swizzled by the row, so that the eight rows which are read at once lie in different banks: 128 bytes are all of them.

#define moegen_leave_if(condition) if (condition) return

namespace moegen {

__device__ __forceinline__ unsigned SharedOffset(const void* pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

// Four 8x8 matrices of 16-bit elements; lane l has the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void LoadMatrices(unsigned (&to)[4], unsigned address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(address));
}

// Where the 16 bytes `chunk` of a row are that is `row` of eight, in bytes from where the row begins.
template <int kRowBytes>
__device__ __forceinline__ int Swizzled(int row, int chunk) {
  static_assert(kRowBytes == 64 || kRowBytes == 128, "as many rows as share the banks have the same swizzle");
  return (chunk ^ row / (128 / kRowBytes)) * 16;
}

struct Bfloat16 {
  static constexpr int kBytes = 2;
  __device__ static __forceinline__ void Multiply(float& c0, float& c1, float& c2, float& c3, const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c0), "+f"(c1), "+f"(c2), "+f"(c3)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};

struct Float16 {
  static constexpr int kBytes = 2;
  __device__ static __forceinline__ void Multiply(float& c0, float& c1, float& c2, float& c3, const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c0), "+f"(c1), "+f"(c2), "+f"(c3)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};

// float32 rounded to tf32. What `ldmatrix` sees as a pair of 16-bit elements is one of them, and so the fragments of m16n8k8 come out right.
struct Tf32 {
  static constexpr int kBytes = 4;
  __device__ static __forceinline__ unsigned Rounded(unsigned value) {
    asm volatile("cvt.rna.tf32.f32 %0, %1;" : "=r"(value) : "f"(__uint_as_float(value)));
    return value;
  }
  __device__ static __forceinline__ void Multiply(float& c0, float& c1, float& c2, float& c3, const unsigned (&a)[4], unsigned b0, unsigned b1) {
    unsigned a0 = Rounded(a[0]), a1 = Rounded(a[1]), a2 = Rounded(a[2]), a3 = Rounded(a[3]);
    b0 = Rounded(b0);
    b1 = Rounded(b1);
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c0), "+f"(c1), "+f"(c2), "+f"(c3)
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
};

// One stage of a warp's tile; `rows` and `columns` are the thread block's.
template <typename Type, int kRowTiles, int kColumnTiles, int kParts, int kColumnWarps, int kTerms, typename Element>
__device__ __forceinline__ void MultiplyStage(float* sums, const Element* rows, const Element* columns) {
  static_assert(sizeof(Element) == Type::kBytes, "rows of another type");
  constexpr int kFragments = kParts * kColumnTiles;  // of 8 columns
  static_assert(kFragments % 2 == 0, "ldmatrix reads two fragments of columns");
  constexpr int kRowBytes = kTerms * Type::kBytes, kPartBytes = kColumnWarps * kColumnTiles * 8 * kRowBytes;
  const int lane = threadIdx.x, row = lane % 8, matrix = lane / 8, warp = threadIdx.y;
  // Of the four matrices of 16 rows the second has the lower rows, the last two the next 16 bytes of terms.
  const unsigned row_at = SharedOffset(rows) + (warp / kColumnWarps * kRowTiles * 16 + matrix % 2 * 8 + row) * kRowBytes;
  const unsigned column_at = SharedOffset(columns) + (warp % kColumnWarps * kColumnTiles * 8 + row) * kRowBytes;
#pragma unroll
  for (int chunk = 0; chunk < kRowBytes / 16; chunk += 2) {
    const unsigned row_chunk = row_at + Swizzled<kRowBytes>(row, chunk + matrix / 2);
    const unsigned column_chunk = column_at + Swizzled<kRowBytes>(row, chunk + matrix % 2);
    unsigned a[kRowTiles][4];
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) LoadMatrices(a[i], row_chunk + i * 16 * kRowBytes);
#pragma unroll
    for (int f = 0; f < kFragments; f += 2) {
      // Fragments f and f + 1, of each the first and then the next 16 bytes of terms.
      const int mine = f + matrix / 2;
      unsigned b[4];
      LoadMatrices(b, column_chunk + mine / kColumnTiles * kPartBytes + mine % kColumnTiles * 8 * kRowBytes);
#pragma unroll
      for (int g = 0; g < 2; ++g) {
        const int part = (f + g) / kColumnTiles, tile = (f + g) % kColumnTiles;
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
          float* upper = sums + (2 * i * kParts + part) * 2 * kColumnTiles + 2 * tile;
          float* lower = upper + kParts * 2 * kColumnTiles;
          Type::Multiply(upper[0], upper[1], lower[0], lower[1], a[i], b[2 * g], b[2 * g + 1]);
        }
      }
    }
  }
}

__device__ __forceinline__ float4 FourAt(const float* row, int bytes) {
  return *reinterpret_cast<const float4*>(reinterpret_cast<const char*>(row) + bytes);
}

// The same in float32: each thread its own rows and columns, four terms at a time.
template <int kRowTiles, int kColumnTiles, int kParts, int kColumnWarps, int kTerms>
__device__ __forceinline__ void MultiplyExactly(float* sums, const float* rows, const float* columns) {
  constexpr int kRows = 2 * kRowTiles, kColumns = 2 * kColumnTiles, kPart = kColumnWarps * kColumnTiles * 8 * kTerms;
  const int lane = threadIdx.x, warp = threadIdx.y, row = lane / 4, column = lane % 4 * 2;
  rows += (warp / kColumnWarps * kRowTiles * 16 + row) * kTerms;
  columns += (warp % kColumnWarps * kColumnTiles * 8 + column) * kTerms;
#pragma unroll 2
  for (int chunk = 0; chunk < kTerms / 4; ++chunk) {
    float4 a[kRows];
#pragma unroll
    for (int m = 0; m < kRows; ++m) a[m] = FourAt(rows + m * 8 * kTerms, Swizzled<kTerms * 4>(row, chunk));
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
        const float4 b = FourAt(columns + part * kPart + (n / 2 * 8 + n % 2) * kTerms, Swizzled<kTerms * 4>(column + n % 2, chunk));
#pragma unroll
        for (int m = 0; m < kRows; ++m) {
          float& sum = sums[(m * kParts + part) * kColumns + n];
          sum = fmaf(a[m].x, b.x, sum);
          sum = fmaf(a[m].y, b.y, sum);
          sum = fmaf(a[m].z, b.z, sum);
          sum = fmaf(a[m].w, b.w, sum);
        }
      }
    }
  }
}

}  // namespace moegen

template <int... kSizes, typename Element>
__device__ __forceinline__ void moegen_mma_bf16(float* sums, const Element* rows, const Element* columns) {
  moegen::MultiplyStage<moegen::Bfloat16, kSizes...>(sums, rows, columns);
}
template <int... kSizes, typename Element>
__device__ __forceinline__ void moegen_mma_f16(float* sums, const Element* rows, const Element* columns) {
  moegen::MultiplyStage<moegen::Float16, kSizes...>(sums, rows, columns);
}
template <int... kSizes>
__device__ __forceinline__ void moegen_mma_tf32(float* sums, const float* rows, const float* columns) {
  moegen::MultiplyStage<moegen::Tf32, kSizes...>(sums, rows, columns);
}
template <int... kSizes>
__device__ __forceinline__ void moegen_fma_f32(float* sums, const float* rows, const float* columns) {
  moegen::MultiplyExactly<kSizes...>(sums, rows, columns);
}
