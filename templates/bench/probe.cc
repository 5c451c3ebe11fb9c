// What this machine can do at most: multiply-adds that stay in registers, and reads that come from memory.
//
// Written with the compiler's vector extensions at the widest registers that -march=native offers, so that it also measures
// machines without AVX-512 or AVX2. Every thread is pinned to a processor of its own; the threads live for one call.

#include <sched.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#define IN_REGISTER "+v"
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#define IN_REGISTER "+x"
#elif defined(__x86_64__)
constexpr int kVectorBytes = 16;
#define IN_REGISTER "+x"
#else
constexpr int kVectorBytes = 16;
#define IN_REGISTER "+w"
#endif

// Independent sums: more than latency x pipes of any processor so far, and with their operands fewer than 16 registers.
// One variable each, because compilers keep an array of vectors in memory.
constexpr int kSums = 12;
#define EACH_SUM(DO) DO(s0) DO(s1) DO(s2) DO(s3) DO(s4) DO(s5) DO(s6) DO(s7) DO(s8) DO(s9) DO(s10) DO(s11)
#define KEEP(sum) __asm__ volatile("" : IN_REGISTER(sum))  // each product counts: none may be merged, moved or left out

typedef float Floats __attribute__((vector_size(kVectorBytes)));
typedef std::uint64_t Words __attribute__((vector_size(kVectorBytes)));

// The i-th processor that this process may use; the thread stays there.
void Pin(int index) {
  cpu_set_t usable;
  if (sched_getaffinity(0, sizeof usable, &usable) != 0) return;
  int seen = 0;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (!CPU_ISSET(cpu, &usable) || seen++ != index % CPU_COUNT(&usable)) continue;
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(cpu, &one);
    sched_setaffinity(0, sizeof one, &one);
    return;
  }
}

// Seconds from the moment when the last of the threads is ready, after `prepare(thread)`, to the moment when the last has
// finished `work(thread)`. The calling thread is never pinned: it would hand its one processor down to threads started later.
template <typename Prepare, typename Work>
double Seconds(int threads, Prepare prepare, Work work) {
  using Clock = std::chrono::steady_clock;
  std::atomic<int> waiting(threads);
  std::atomic<bool> go(false);
  std::vector<Clock::time_point> ends(static_cast<std::size_t>(threads));
  std::vector<std::thread> running;
  for (int t = 0; t < threads; ++t) {
    running.emplace_back([&, t] {
      Pin(t);
      prepare(t);
      waiting.fetch_sub(1);
      while (!go.load(std::memory_order_acquire)) std::this_thread::yield();
      work(t);
      ends[static_cast<std::size_t>(t)] = Clock::now();
    });
  }
  while (waiting.load() > 0) std::this_thread::yield();
  auto start = Clock::now();
  go.store(true, std::memory_order_release);
  for (auto& thread : running) thread.join();
  return std::chrono::duration<double>(*std::max_element(ends.begin(), ends.end()) - start).count();
}

constexpr long kWarmth = 8;  // one part in so many is computed in advance, so that the processor is awake and at its clock

volatile float float_sink;
volatile std::uint64_t word_sink;

void MultiplyAdds(long rounds) {
  Floats term = Floats{} + 1.0f, factor = term * 0.5f;
#define START(sum) Floats sum = term;
#define STEP(sum) sum = sum * factor + term; KEEP(sum);
  EACH_SUM(START)
  for (long i = 0; i < rounds; ++i) {
    EACH_SUM(STEP)
  }
#undef START
#undef STEP
  float_sink = s0[0];
}

#ifdef __AVX512BF16__
void Bf16Dots(long rounds) {
  __m512bh factor = reinterpret_cast<__m512bh>(_mm512_set1_epi16(0x3c00));  // 0.0078125 in bfloat16
#define START(sum) __m512 sum = _mm512_setzero_ps();
#define STEP(sum) sum = _mm512_dpbf16_ps(sum, factor, factor); KEEP(sum);
  EACH_SUM(START)
  for (long i = 0; i < rounds; ++i) {
    EACH_SUM(STEP)
  }
#undef START
#undef STEP
  float_sink = _mm512_cvtss_f32(s0);
}
#endif

// Two streams at a time, which keeps more lines under way than one: on the machines tried, the fastest of one to sixteen.
void Read(const char* begin, std::size_t bytes) {
  const Words* first = reinterpret_cast<const Words*>(begin);
  const Words* second = first + bytes / kVectorBytes / 2;
  Words a{}, b{}, c{}, d{};
  for (const Words* end = second; first < end; first += 4, second += 4) {
    a += first[0] + first[1], b += first[2] + first[3];
    c += second[0] + second[1], d += second[2] + second[3];
  }
  a += b + c + d;
  word_sink = a[0];
}

}  // namespace

extern "C" {

// float32 operations of one thread in one round: a multiply-add is two.
double probe_fma_flops() { return 2.0 * kSums * kVectorBytes / sizeof(float); }

// The same of bfloat16 dot products of pairs; 0 where the processor has none.
double probe_bf16_flops() {
#ifdef __AVX512BF16__
  return 4.0 * kSums * kVectorBytes / sizeof(float);
#else
  return 0.0;
#endif
}

double probe_fma_seconds(int threads, long rounds) {
  return Seconds(threads, [=](int) { MultiplyAdds(rounds / kWarmth); }, [=](int) { MultiplyAdds(rounds); });
}

double probe_bf16_seconds(int threads, long rounds) {
#ifdef __AVX512BF16__
  return Seconds(threads, [=](int) { Bf16Dots(rounds / kWarmth); }, [=](int) { Bf16Dots(rounds); });
#else
  (void)threads, (void)rounds;
  return 0.0;
#endif
}

// Memory to read from, on huge pages where the system has them; null when there is none. Freed by probe_free.
char* probe_allocate(std::size_t bytes) {
  char* memory = static_cast<char*>(std::aligned_alloc(std::size_t{2} << 20, bytes));
  if (memory == nullptr) return nullptr;
#ifdef MADV_HUGEPAGE
  madvise(memory, bytes, MADV_HUGEPAGE);
#endif
  std::memset(memory, 1, bytes);
  return memory;
}

void probe_free(char* memory) { std::free(memory); }

// Each thread reads a slice of its own; `bytes` is a multiple of threads * 1024.
double probe_read_seconds(int threads, const char* memory, std::size_t bytes) {
  std::size_t slice = bytes / static_cast<std::size_t>(threads);
  return Seconds(threads, [](int) {}, [=](int t) { Read(memory + slice * static_cast<std::size_t>(t), slice); });
}
}
