// A product with Hopper's instructions for tests/test_emulator.py: tensor copies, mbarriers, wgmma with every layout of its operands.
#include <cstdint>
#include <cuda.h>
#include <cuda_bf16.h>

enum Kind { kSwizzle128, kSwizzle64, kSwizzle32, kPlain, kTransposed, kRegisters };
enum Fault { kNone, kNoBarrier, kEarlyCopy, kFewBytes, kNoWait, kNoFence };
constexpr int kTile = 64, kStages = 2, kTileBytes = kTile * kTile * 2;

__device__ __forceinline__ uint32_t shared_address(const void* at) { return (uint32_t)__cvta_generic_to_shared(at); }

__device__ __forceinline__ bool elected() {
  uint32_t leader;
  asm volatile("{ .reg .pred p;\n elect.sync _|p, 0xffffffff;\n selp.b32 %0, 1, 0, p; }" : "=r"(leader));
  return leader != 0;
}

__device__ __forceinline__ void wait_for(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\nAGAIN:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra AGAIN;\n}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

__device__ __forceinline__ uint64_t descriptor(uint32_t at, uint32_t leading, uint32_t stride, uint64_t swizzle) {
  return (uint64_t)((at & 0x3ffff) >> 4) | (uint64_t)(leading >> 4) << 16 | (uint64_t)(stride >> 4) << 32 | swizzle << 62;
}

#define SUMS(s) \
  "+f"(s[0]), "+f"(s[1]), "+f"(s[2]), "+f"(s[3]), "+f"(s[4]), "+f"(s[5]), "+f"(s[6]), "+f"(s[7]), "+f"(s[8]), "+f"(s[9]), "+f"(s[10]), \
      "+f"(s[11]), "+f"(s[12]), "+f"(s[13]), "+f"(s[14]), "+f"(s[15]), "+f"(s[16]), "+f"(s[17]), "+f"(s[18]), "+f"(s[19]), "+f"(s[20]),  \
      "+f"(s[21]), "+f"(s[22]), "+f"(s[23]), "+f"(s[24]), "+f"(s[25]), "+f"(s[26]), "+f"(s[27]), "+f"(s[28]), "+f"(s[29]), "+f"(s[30]),  \
      "+f"(s[31])
#define WGMMA                                                                                                                   \
  "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "

__device__ __forceinline__ void multiply(float (&s)[32], uint64_t a, uint64_t b, int accumulate, int transposed) {
  if (transposed) {
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %34, 0; " WGMMA "%32, %33, p, 1, 1, 0, 1; }" : SUMS(s) : "l"(a), "l"(b), "r"(accumulate));
  } else {
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %34, 0; " WGMMA "%32, %33, p, 1, 1, 0, 0; }" : SUMS(s) : "l"(a), "l"(b), "r"(accumulate));
  }
}
__device__ __forceinline__ void multiply(float (&s)[32], const uint32_t (&a)[4], uint64_t b, int accumulate) {
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %37, 0; " WGMMA "{%32, %33, %34, %35}, %36, p, 1, 1, 0; }"
               : SUMS(s)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));
}

// y[m, n] = bias[n] + sum of k: a[m, k] b[n, k] (b[k, n] for kTransposed), with one warpgroup for 64 x 64 of it. `inner` is the
// width of the maps' boxes, whose height is 64.
template <int kind>
__device__ __forceinline__ void product(const CUtensorMap& a_map, const CUtensorMap& b_map, const __nv_bfloat16* a, const float* bias,
                                        float* y, int m, int n, int k, int fault, unsigned char* memory) {
  constexpr int inner = kind == kSwizzle64 ? 32 : kind == kSwizzle32 ? 16 : kind == kPlain ? 8 : 64;
  constexpr int boxes = kTile / inner, box_bytes = kTileBytes / boxes;
  constexpr uint64_t swizzle = inner == 64 ? 1 : inner == 32 ? 2 : inner == 16 ? 3 : 0;
  __shared__ uint64_t full[kStages];
  __shared__ alignas(16) float biases[kTile];
  __shared__ uint64_t ready;
  int m0 = blockIdx.y * kTile, n0 = blockIdx.x * kTile, steps = (k + kTile - 1) / kTile;
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(shared_address(&full[s])));
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&ready)), "r"(1));
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  bool producer = threadIdx.x < 32 && elected();
  auto load = [&](int step) {
    uint32_t barrier = shared_address(&full[step % kStages]), at = shared_address(memory) + step % kStages * 2 * kTileBytes;
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(2 * kTileBytes - (fault == kFewBytes ? 16 : 0)) : "memory");
    for (int box = 0; box < boxes; ++box) {
      asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
                       at + box * box_bytes),
                   "l"(&a_map), "r"(step * kTile + box * inner), "r"(m0), "r"(barrier)
                   : "memory");
      asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
                       at + kTileBytes + box * box_bytes),
                   "l"(&b_map), "r"(kind == kTransposed ? n0 : step * kTile + box * inner), "r"(kind == kTransposed ? step * kTile : n0), "r"(barrier)
                   : "memory");
    }
  };
  if (producer) {
    uint32_t bytes = kTile * 4;
    asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&ready)), "r"(bytes) : "memory");
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared_address(biases)),
                 "l"(bias + n0), "r"(bytes), "r"(shared_address(&ready))
                 : "memory");
    load(0);
  }
  float sums[32];
  int warp = threadIdx.x / 32, group = threadIdx.x % 32 / 4, thread = threadIdx.x % 4;
  for (int step = 0; step < steps; ++step) {
    if (producer && step + 1 < steps && fault != kEarlyCopy) load(step + 1);
    if (fault != kNoBarrier) wait_for(&full[step % kStages], step / kStages % 2);
    if (fault != kNoFence) asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
    for (int at = 0; at < kTile; at += 16) {
      uint32_t base = shared_address(memory) + step % kStages * 2 * kTileBytes;
      uint32_t offset = at / inner * box_bytes + at % inner * 2;
      uint64_t left = descriptor(base + offset, inner == 8 ? box_bytes : 16, inner * 16, swizzle);
      uint64_t right = descriptor(base + kTileBytes + offset, inner == 8 ? box_bytes : 16, inner * 16, swizzle);
      if (kind == kTransposed) right = descriptor(base + kTileBytes + at * 128, 8192, 1024, 1);
      if (kind == kRegisters) {
        uint32_t fragment[4];
        for (int i = 0; i < 4; ++i) {
          int row = m0 + warp * 16 + group + i % 2 * 8, column = step * kTile + at + thread * 2 + i / 2 * 8;
          fragment[i] = row < m && column < k ? *(const uint32_t*)(a + (long long)row * k + column) : 0;
        }
        multiply(sums, fragment, right, step > 0 || at > 0);
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
      } else {
        multiply(sums, left, right, step > 0 || at > 0, kind == kTransposed);
      }
    }
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    if (fault == kEarlyCopy && producer && step + 1 < steps) {  // into the other stage, whose products are not known to be done
      if (step > 0) asm volatile("nanosleep.u32 1;");
      load(step + 1);
    }
    if (fault != kEarlyCopy && fault != kNoWait) {
      asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
      __syncthreads();
    }
  }
  if (fault == kEarlyCopy) asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  wait_for(&ready, 0);
  for (int i = 0; i < 32; ++i) {
    int row = m0 + warp * 16 + group + i / 2 % 2 * 8, column = i / 4 * 8 + thread * 2 + i % 2;
    if (row < m && n0 + column < n) y[(long long)row * n + n0 + column] = sums[i] + biases[column];
  }
}

#define KERNEL(name, kind)                                                                                                           \
  extern "C" __global__ void __launch_bounds__(128)                                                                                  \
      name(const __grid_constant__ CUtensorMap a_map, const __grid_constant__ CUtensorMap b_map, const __nv_bfloat16* a,             \
           const float* bias, float* y, int m, int n, int k, int fault) {                                                            \
    extern __shared__ __align__(1024) unsigned char memory[];                                                                        \
    product<kind>(a_map, b_map, a, bias, y, m, n, k, fault, memory);                                                                 \
  }
KERNEL(swizzle_128, kSwizzle128)
KERNEL(swizzle_64, kSwizzle64)
KERNEL(swizzle_32, kSwizzle32)
KERNEL(plain, kPlain)
KERNEL(transposed, kTransposed)
KERNEL(registers, kRegisters)

// Rows of x gathered by cp.async, whose arrival an mbarrier counts; each thread then adds up what its neighbour has copied.
extern "C" __global__ void gathered(const float* x, const int* rows, float* y, int early) {
  __shared__ alignas(16) float copied[64][4];
  __shared__ uint64_t barrier;
  if (threadIdx.x == 0) asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(&barrier)), "r"(blockDim.x));
  __syncthreads();
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(copied[threadIdx.x])), "l"(x + rows[threadIdx.x] * 4) : "memory");
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(&barrier)) : "memory");
  if (!early) wait_for(&barrier, 0);
  const float* at = copied[(threadIdx.x + 1) % blockDim.x];
  y[threadIdx.x] = at[0] + at[1] + at[2] + at[3];
}
