// Kernels for tests/test_emulator.py: written as the generated ones are, so that nvcc takes them too. Some are wrong on purpose.
#include <cstdint>
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define STAGES 3
constexpr int kRows = 32, kColumns = 64, kDepth = 32, kPitch = kDepth + 8;

enum Fault { kNone, kNoWait, kNoBarrier, kMisaligned, kEarlyCopy };

__device__ __forceinline__ void copy16(void* to, const void* from, bool wanted) {
  unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile(
      "{ .reg .pred p;\n"
      "  setp.ne.b32 p, %0, 0;\n"
      "  @p cp.async.cg.shared.global.L2::128B [%1], [%2], %3;\n"
      "  @!p st.shared.v4.b32 [%1], {%4, %4, %4, %4}; }\n" ::"r"((int)wanted),
      "r"(at), "l"(from), "n"(16), "r"(0)
      : "memory");
}

#define COMMIT() asm volatile("cp.async.commit_group;\n" ::: "memory")
#define WAIT(n) asm volatile("cp.async.wait_group %0;\n" ::"n"(n) : "memory")

// y[m, n] = sum of k: x[rows[m], k] w[n, k], for `count` rows and any `columns`; depth is a multiple of 32, 4 warps of 16 x 32.
extern "C" __global__ void __launch_bounds__(128) gather_gemm(const __nv_bfloat16* __restrict__ x, const __nv_bfloat16* __restrict__ w,
                                                              const int* __restrict__ rows, float* __restrict__ y, int count, int columns,
                                                              int depth, int fault) {
  extern __shared__ __align__(128) unsigned char memory[];
  __nv_bfloat16* a = reinterpret_cast<__nv_bfloat16*>(memory);
  __nv_bfloat16* b = a + STAGES * kRows * kPitch;
  __shared__ int row_of[kRows];
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, m0 = blockIdx.y * kRows, n0 = blockIdx.x * kColumns;
  if (threadIdx.x < kRows) row_of[threadIdx.x] = m0 + threadIdx.x < count ? rows[m0 + threadIdx.x] : -1;
  __syncthreads();

  auto load = [&](int stage, int k0) {
    int row = threadIdx.x / 4, part = threadIdx.x % 4 * 8;
    int token = row_of[row];
    int shift = fault == kMisaligned ? 4 : 0;
    copy16(a + (stage * kRows + row) * kPitch + part + shift, x + (long long)max(token, 0) * depth + k0 + part, token >= 0);
    for (int i = 0; i < 2; ++i) {
      int n = n0 + row + 32 * i;
      copy16(b + (stage * kColumns + row + 32 * i) * kPitch + part, w + (long long)(n < columns ? n : 0) * depth + k0 + part, n < columns);
    }
  };

  float sums[4][4] = {};
  int steps = depth / kDepth;
  for (int s = 0; s < STAGES - 1; ++s) {
    if (s < steps) load(s, s * kDepth);
    COMMIT();
  }
  for (int step = 0; step < steps; ++step) {
    if (fault != kNoWait) WAIT(STAGES - 2);
    if (fault != kNoBarrier) __syncthreads();
    int next = step + STAGES - 1;
    int into = fault == kEarlyCopy ? step % STAGES : next % STAGES;
    if (next < steps) load(into, next * kDepth);
    COMMIT();
    int stage = step % STAGES;
#pragma unroll
    for (int k = 0; k < kDepth; k += 16) {
      unsigned fa[4], fb[4][2];
      unsigned at = static_cast<unsigned>(
          __cvta_generic_to_shared(a + (stage * kRows + warp / 2 * 16 + lane % 16) * kPitch + k + lane / 16 * 8));
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                   : "=r"(fa[0]), "=r"(fa[1]), "=r"(fa[2]), "=r"(fa[3])
                   : "r"(at));
      for (int j = 0; j < 4; ++j) {
        at = static_cast<unsigned>(
            __cvta_generic_to_shared(b + (stage * kColumns + warp % 2 * 32 + j * 8 + lane % 8) * kPitch + k + lane / 8 % 2 * 8));
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];\n" : "=r"(fb[j][0]), "=r"(fb[j][1]) : "r"(at));
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
            "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
            : "+f"(sums[j][0]), "+f"(sums[j][1]), "+f"(sums[j][2]), "+f"(sums[j][3])
            : "r"(fa[0]), "r"(fa[1]), "r"(fa[2]), "r"(fa[3]), "r"(fb[j][0]), "r"(fb[j][1]));
      }
    }
  }
  for (int j = 0; j < 4; ++j) {
    for (int i = 0; i < 4; ++i) {
      int m = m0 + warp / 2 * 16 + lane / 4 + i / 2 * 8, n = n0 + warp % 2 * 32 + j * 8 + lane % 4 * 2 + i % 2;
      if (m < count && n < columns) y[(long long)m * columns + n] = sums[j][i];
    }
  }
}

// One warp: y[16, 8] = a[16, 8 or 16] b[8, 8 or 16]^T as tf32 (0), float16 (1: 16 deep, 2: 8 deep).
extern "C" __global__ void fragments(const float* a, const float* b, float* y, int kind) {
  int group = threadIdx.x / 4, thread = threadIdx.x % 4, depth = kind == 1 ? 16 : 8;
  float d[4] = {1.0f, 2.0f, 3.0f, 4.0f};
  if (kind == 0) {
    uint32_t fa[4], fb[2];
    for (int i = 0; i < 4; ++i) {
      asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(fa[i]) : "f"(a[(group + i % 2 * 8) * depth + thread + i / 2 * 4]));
    }
    for (int i = 0; i < 2; ++i) asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(fb[i]) : "f"(b[group * depth + thread + i * 4]));
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(fa[0]), "r"(fa[1]), "r"(fa[2]), "r"(fa[3]), "r"(fb[0]), "r"(fb[1]));
  } else {
    half2 fa[4], fb[2];
    for (int i = 0; i < (kind == 1 ? 4 : 2); ++i) {
      const float* at = a + (group + i % 2 * 8) * depth + thread * 2 + i / 2 * 8;
      fa[i] = __floats2half2_rn(at[0], at[1]);
    }
    for (int i = 0; i < (kind == 1 ? 2 : 1); ++i) {
      const float* at = b + group * depth + thread * 2 + i * 8;
      fb[i] = __floats2half2_rn(at[0], at[1]);
    }
    const unsigned *ua = reinterpret_cast<unsigned*>(fa), *ub = reinterpret_cast<unsigned*>(fb);
    if (kind == 1) {
      asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                   : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                   : "r"(ua[0]), "r"(ua[1]), "r"(ua[2]), "r"(ua[3]), "r"(ub[0]), "r"(ub[1]));
    } else {
      asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
                   : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                   : "r"(ua[0]), "r"(ua[1]), "r"(ub[0]));
    }
  }
  for (int i = 0; i < 4; ++i) y[(group + i / 2 * 8) * 8 + thread * 2 + i % 2] = d[i];
}

// 8 x 8 blocks of b16 read transposed and written back by stmatrix: y = x^T for a 16 x 16 matrix.
extern "C" __global__ void __launch_bounds__(32) transpose(const uint16_t* x, uint16_t* y) {
  __shared__ alignas(16) uint16_t from[16 * 16], to[16 * 16];
  for (int i = threadIdx.x; i < 256; i += 32) from[i] = x[i];
  __syncwarp();
  unsigned r0, r1, r2, r3;
  int lane = threadIdx.x;
  unsigned at = (unsigned)__cvta_generic_to_shared(from + lane % 16 * 16 + lane / 16 * 8);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r0), "=r"(r1), "=r"(r2), "=r"(r3)
               : "r"(at));
#if __CUDA_ARCH__ >= 900
  at = (unsigned)__cvta_generic_to_shared(to + (lane / 16 * 8 + lane % 8) * 16 + lane / 8 % 2 * 8);
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(r0), "r"(r1), "r"(r2), "r"(r3) : "memory");
#endif
  __syncwarp();
  for (int i = threadIdx.x; i < 256; i += 32) y[i] = to[i];
}

// Sums, maxima, votes and the first thread with the largest value, by shuffles over a block.
extern "C" __global__ void reduce(const float* x, float* sums, int* said, int n) {
  __shared__ float part[32];
  int thread = threadIdx.x + threadIdx.y * blockDim.x, lane = thread % 32, warp = thread / 32, threads = blockDim.x * blockDim.y;
  float sum = 0.0f;
  for (int i = thread; i < n; i += threads) sum += x[blockIdx.x * n + i];
  for (int by = 16; by > 0; by /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, by);
  if (lane == 0) part[warp] = sum;
  __syncthreads();
  if (warp == 0) {
    sum = lane < threads / 32 ? part[lane] : 0.0f;
    for (int by = 16; by > 0; by /= 2) sum += __shfl_down_sync(__activemask(), sum, by);
    if (lane == 0) sums[blockIdx.x] = sum;
  }
  bool positive = thread < n && x[blockIdx.x * n + thread] > 0.0f;
  unsigned ballot = __ballot_sync(0xffffffffu, positive);
  int count = __syncthreads_count(positive);
  if (thread == 0) {
    said[blockIdx.x * 4 + 0] = __popc(ballot);
    said[blockIdx.x * 4 + 1] = count;
  }
  int upper = __shfl_up_sync(0xffffffffu, lane, 1, 8);
  int total = __reduce_add_sync(0xffffffffu, upper);
  unsigned same = __match_any_sync(0xffffffffu, lane % 3);
  if (thread == 1) {
    said[blockIdx.x * 4 + 2] = total;
    said[blockIdx.x * 4 + 3] = __popc(same);
  }
}

__device__ int blocks_done;

// counts[v] += how often v is among x: shared atomics, then global ones; the last block notes that it is the last.
extern "C" __global__ void histogram(const int* x, int* counts, float* total, int* last, int n, int bins) {
  extern __shared__ int local[];
  for (int i = threadIdx.x; i < bins; i += blockDim.x) local[i] = 0;
  __syncthreads();
  int at = blockIdx.x * blockDim.x + threadIdx.x;
  if (at < n) {
    atomicAdd(&local[x[at]], 1);
    atomicAdd(total, 0.5f);
    atomicMax(last, x[at]);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < bins; i += blockDim.x) atomicAdd(counts + i, local[i]);
  __threadfence();
  if (threadIdx.x == 0 && atomicAdd(&blocks_done, 1) == (int)gridDim.x - 1) {
    last[1] = blockIdx.x + 1;
    blocks_done = 0;
  }
}

// Each warp hands a value on through shared memory; without the barrier between, only an order that is not the warps' own shows it.
extern "C" __global__ void hand_on(int* y, int barrier) {
  __shared__ int value[256];
  value[threadIdx.x] = threadIdx.x;
  if (barrier) __syncthreads();
  y[threadIdx.x] = value[(threadIdx.x + blockDim.x - 32) % blockDim.x];
}

// A thread does something that a device refuses.
extern "C" __global__ void refuse(float* y, int what, int n) {
  __shared__ float four[4];
  int thread = threadIdx.x;
  if (what == 0) y[n + thread] = 1.0f;                          // beyond the end
  if (what == 1) *(float4*)(y + 1) = make_float4(0, 0, 0, 0);  // not a multiple of 16
  if (what == 2 && thread < 32) __syncthreads();               // two barriers at once
  if (what == 2 && thread >= 32) __syncthreads();
  if (what == 3 && thread < 32) asm volatile("bar.sync 1, 96;");  // the third warp never comes
  if (what == 4 && thread % 32 < 16) y[0] = __shfl_sync(0xffffffffu, y[0], 0);
  if (what == 4 && thread % 32 >= 16) y[0] = __shfl_xor_sync(0xffffffffu, thread, 1);
  if (what == 5) asm volatile("st.shared.b32 [%0], %1;" ::"r"((unsigned)__cvta_generic_to_shared(four) + 4096), "r"(0));
  if (what == 6) four[n * 512 + thread] = 1.0f;
  if (what == 7) y[0] = four[thread % 4];                       // never written: NaN
  if (what == 8) asm volatile("trap;");
  if (what == 9 && thread == 5) y[0] = 8 / (n - 8);
}
