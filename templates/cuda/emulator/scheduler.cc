// Which fiber runs, and how fibers wait: meetings of a warp's lanes, barriers of a block's threads.
#include <cstdio>
#include <cstring>
#include <map>
#include <utility>

#include "block.h"

#ifdef MOEGEN_EMULATOR_ASSEMBLY
// The jump through a register rather than `ret`: the processor foretells where a fiber goes on by where the last one did.
asm(R"(
.text
.p2align 4
.globl moegen_emulator_switch
.hidden moegen_emulator_switch
.type moegen_emulator_switch, @function
moegen_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  popq %rcx
  jmp *%rcx
.size moegen_emulator_switch, . - moegen_emulator_switch
)");
#endif

namespace emulator {

__thread Fiber* current = nullptr;

namespace {

constexpr uint64_t kSpinLimit = 20'000'000;

unsigned Lowest(uint32_t mask) { return static_cast<unsigned>(__builtin_ctz(mask)); }
unsigned Highest(uint32_t mask) { return 31u - static_cast<unsigned>(__builtin_clz(mask)); }
unsigned Count(uint32_t mask) { return static_cast<unsigned>(__builtin_popcount(mask)); }

unsigned AnyLane(uint32_t mask, Random* random) {
  for (unsigned skip = (*random)(Count(mask)); skip > 0; --skip) mask &= mask - 1;
  return Lowest(mask);
}

Fiber* FiberAt(Block* block, unsigned warp, unsigned lane) { return &block->fibers[warp * kWarp + lane]; }

Fiber* AnyFiber(Block* block) {
  unsigned first = block->random(block->warps);
  for (unsigned i = 0; i < block->warps; ++i) {
    unsigned warp = (first + i) % block->warps;
    if (uint32_t ready = block->warp[warp].ready) return FiberAt(block, warp, AnyLane(ready, &block->random));
  }
  return nullptr;
}

// The fiber that goes on after one of `warp` has stopped: its own warp first, so that one warp runs as far as it can.
Fiber* Next(Block* block, unsigned warp) {
  if (block->order == Order::kShuffled) return AnyFiber(block);
  bool up = block->order == Order::kAscending;
  for (unsigned i = 0; i < block->warps; ++i) {
    if (uint32_t ready = block->warp[warp].ready) return FiberAt(block, warp, up ? Lowest(ready) : Highest(ready));
    warp = up ? (warp + 1) % block->warps : (warp + block->warps - 1) % block->warps;
  }
  return nullptr;
}

[[noreturn]] void Stuck(const Block& block) {
  std::map<std::pair<std::string, int>, unsigned> waiting;
  for (const Fiber& fiber : block.fibers) {
    if (fiber.waiting.what != nullptr) ++waiting[{fiber.waiting.what, fiber.waiting.detail}];
  }
  std::string said;
  for (const auto& [where, count] : waiting) {
    said += (said.empty() ? "" : ", ") + std::to_string(count) + " at " + where.first;
    if (where.second != 0) said += " " + std::to_string(where.second);
  }
  Fail("deadlock: %u of %u threads have ended and the others wait for ever: %s", block.threads - block.live, block.threads,
       said.c_str());
}

// Does one thing that the device has to do beside its threads: the first or the last asked for, or any.
void DeliverOne(Block* block) {
  size_t count = block->events.size(), which = 0;
  if (block->order == Order::kDescending) which = count - 1;
  if (block->order == Order::kShuffled) which = block->random(static_cast<uint32_t>(count));
  Event event = block->events[which];
  block->events.erase(block->events.begin() + static_cast<ptrdiff_t>(which));
  block->spins = 0;
  Fiber* me = current;
  current = event.fiber;  // for messages
  event.deliver(event);
  current = me;
}

void Go(Fiber* from, Fiber* to) {
  if (to == from) return;
  current = to;
  Switch(&from->context, to->context);
}

// The caller is not ready: others run until it is.
void Leave(Fiber* me) {
  Block* block = me->block;
  unsigned warp = static_cast<unsigned>(me->warp - block->warp);
  if (block->order == Order::kShuffled && !block->events.empty() && block->random(8) == 0) DeliverOne(block);
  Fiber* next = Next(block, warp);
  while (next == nullptr) {
    if (block->events.empty()) Stuck(*block);
    DeliverOne(block);
    next = Next(block, warp);
  }
  Go(me, next);
}

void Wait(Fiber* me, const char* what, int detail) {
  me->warp->ready &= ~(1u << me->lane);
  me->waiting = {what, detail};
  Leave(me);
  me->waiting.what = nullptr;
}

void Complete(Warp* warp, Meeting* meeting) {
  meeting->operation->perform(meeting->operands, meeting->arrived);
  warp->ready |= meeting->arrived;
  const Meeting* last = &warp->meeting[--warp->meetings];
  if (meeting != last) *meeting = *last;
}

Meeting* MeetingOf(Warp* warp, uint32_t mask, const Operation& operation) {
  for (unsigned i = 0; i < warp->meetings; ++i) {
    Meeting* meeting = &warp->meeting[i];
    if (meeting->mask == mask && meeting->operation == &operation) return meeting;
    if ((meeting->mask & mask) != 0) {
      Fail("lanes of one warp have diverged: some are at %s with mask 0x%08x, this one is at %s with mask 0x%08x",
           meeting->operation->name, meeting->mask, operation.name, mask);
    }
  }
  Meeting* meeting = &warp->meeting[warp->meetings++];
  meeting->mask = mask;
  meeting->arrived = 0;
  meeting->operation = &operation;
  return meeting;
}

void Release(Block* block, Barrier* barrier) {
  for (unsigned w = 0; w < block->warps; ++w) block->warp[w].ready |= barrier->waiting[w];
  *barrier = Barrier{};
  block->spins = 0;
}

uint32_t Voted(Vote vote, unsigned trues, unsigned arrived) {
  switch (vote) {
    case Vote::kCount: return trues;
    case Vote::kAnd: return trues == arrived;
    case Vote::kOr: return trues > 0;
    default: return 0;
  }
}

void GiveResults(Block* block, const Barrier& barrier, uint32_t result) {
  for (unsigned w = 0; w < block->warps; ++w) {
    for (uint32_t left = barrier.waiting[w]; left != 0; left &= left - 1) FiberAt(block, w, Lowest(left))->result = result;
  }
}

void Depart(Fiber* me) {
  Block* block = me->block;
  Warp* warp = me->warp;
  uint32_t bit = 1u << me->lane;
  warp->live &= ~bit;
  warp->ready &= ~bit;
  --block->live;
  block->spins = 0;
  for (unsigned i = warp->meetings; i-- > 0;) {
    Meeting* meeting = &warp->meeting[i];
    if ((meeting->mask & bit) == 0) continue;
    if (meeting->operation->aligned) Fail("this thread ends while others of its warp wait for it at %s", meeting->operation->name);
    if (meeting->arrived == (meeting->mask & warp->live)) Complete(warp, meeting);
  }
  if (Group& group = block->group[me->index / kGroup]; group.arrived > 0) {
    Fail("this thread ends while others of its warpgroup wait for it at %s", group.operation->name);
  }
  for (Barrier& barrier : block->barrier) {  // threads that have ended count as arrived, as they do on the device
    if (barrier.arrived > 0 && barrier.expected == 0 && barrier.arrived == block->live) {
      GiveResults(block, barrier, Voted(barrier.vote, barrier.trues, barrier.arrived));
      Release(block, &barrier);
    }
  }
}

void Main() {
  Fiber* me = current;
  me->block->kernel->call(me->block->arguments);
  Depart(me);
  if (me->block->live > 0) Leave(me);
  for (const Event& event : me->block->events) {
    if (event.name != nullptr) Fail("the block has ended and a %s has not arrived", event.name);
  }
  current = nullptr;
  Switch(&me->context, me->block->base);
  __builtin_unreachable();
}

void Prepare(Block* block, unsigned index) {
  const dim3& size = block->place.size;
  Fiber* fiber = &block->fibers[index];
  fiber->index = index;
  fiber->lane = index % kWarp;
  fiber->thread = {index % size.x, index / size.x % size.y, index / (size.x * size.y)};
  fiber->place = &block->place;
  fiber->block = block;
  fiber->warp = &block->warp[index / kWarp];
  fiber->waiting.what = nullptr;
  fiber->copies = Copies{};
  char* bottom = block->stacks + index * block->stack_stride;
  // Tops of stacks at different places of a page: otherwise all of them compete for the same few lines of the cache.
  char* top = bottom + block->stack_stride - 4096 - index * 832 % 4096;
  Prepare(&fiber->context, bottom, top, Main);
}

}  // namespace

void Run(Block* block) {
  const dim3& size = block->place.size;
  block->threads = block->live = size.x * size.y * size.z;
  block->warps = (block->threads + kWarp - 1) / kWarp;
  block->fibers.resize(block->threads);
  block->failed = false;
  block->spins = 0;
  for (Barrier& barrier : block->barrier) barrier = Barrier{};
  for (Group& group : block->group) {
    group.arrived = 0;
    ptx::Free(std::exchange(group.products, nullptr));
  }
  block->waiting_at.clear();
  block->events.clear();
  for (unsigned w = 0; w < block->warps; ++w) {
    unsigned lanes = block->threads - w * kWarp;
    block->warp[w].ready = block->warp[w].live = lanes >= kWarp ? kAllLanes : (1u << lanes) - 1;
    block->warp[w].meetings = 0;
  }
  for (unsigned i = 0; i < block->threads; ++i) Prepare(block, i);
  std::memset(block->arena, kPoison, block->arena_bytes);
  current = Next(block, block->order == Order::kDescending ? block->warps - 1 : 0);
  Switch(&block->base, current->context);
}

void Abandon(const std::string& message) {
  Fiber* me = current;
  Block* block = me->block;
  const uint3& at = block->place.block;
  char place[200];
  std::snprintf(place, sizeof place, "kernel %s, block (%u, %u, %u), thread (%u, %u, %u): ", block->kernel->name, at.x, at.y, at.z,
                me->thread.x, me->thread.y, me->thread.z);
  block->message = place + message;
  block->failed = true;
  current = nullptr;
  Switch(&me->context, block->base);
  __builtin_unreachable();
}

void Fail(const char* format, ...) {
  char text[1000];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  Abandon(text);
}

void Yield() {
  Block* block = current->block;
  if (++block->spins > kSpinLimit) Fail("threads spin without end on something that no other thread of the block changes");
  Go(current, AnyFiber(block));
}

void Meet(uint32_t mask, const Operation& operation, void* operands) {
  Fiber* me = current;
  Warp* warp = me->warp;
  uint32_t bit = 1u << me->lane;
  if ((mask & bit) == 0) Fail("%s: the mask 0x%08x leaves out lane %u, which executes it", operation.name, mask, me->lane);
  if (operation.aligned && (mask & warp->live) != kAllLanes) {
    Fail("%s needs all 32 lanes of the warp, of which 0x%08x have not ended", operation.name, warp->live);
  }
  Meeting* meeting = MeetingOf(warp, mask, operation);
  meeting->operands[me->lane] = operands;
  meeting->arrived |= bit;
  if (meeting->arrived != (mask & warp->live)) return Wait(me, operation.name, 0);
  Complete(warp, meeting);
  me->block->spins = 0;
  if (me->block->order == Order::kShuffled) Yield();
}

uint32_t Synchronize(unsigned id, unsigned threads, int place, bool wait, Vote vote, bool value) {
  Fiber* me = current;
  Block* block = me->block;
  const char* name = place != 0 ? "__syncthreads in line" : "bar.sync";
  if (id >= kBarriers) Fail("bar.sync %u: there are barriers 0 to %u", id, kClusterBarrier - 1);
  if (threads % kWarp != 0) Fail("bar.sync %u, %u: the count of threads is not a multiple of 32", id, threads);
  Barrier* barrier = &block->barrier[id];
  if (barrier->arrived == 0) {
    barrier->expected = threads;
    barrier->place = place;
    barrier->vote = vote;
  } else if (barrier->expected != threads) {
    Fail("bar.sync %u: this thread expects %u threads, others expect %u (0: all)", id, threads, barrier->expected);
  } else if (barrier->place != place) {
    Fail("threads of one block wait at different barriers: some in line %d, this one in line %d", barrier->place, place);
  }
  barrier->trues += value;
  ++barrier->arrived;
  unsigned expected = threads == 0 ? block->live : threads;
  if (barrier->arrived < expected) {
    if (!wait) return 0;
    barrier->waiting[me->index / kWarp] |= 1u << me->lane;
    Wait(me, name, place != 0 ? place : static_cast<int>(id));
    return me->result;
  }
  uint32_t result = Voted(vote, barrier->trues, barrier->arrived);
  if (vote != Vote::kNone) GiveResults(block, *barrier, result);
  Release(block, barrier);
  if (block->order == Order::kShuffled) Yield();
  return result;
}

void MeetGroup(const Operation& operation, void* operands) {
  Fiber* me = current;
  Block* block = me->block;
  unsigned first = me->index / kGroup * kGroup;
  Group* group = &block->group[first / kGroup];
  if (first + kGroup > block->threads)
    Fail("%s needs a warpgroup of 128 threads, the last of this block has fewer", operation.name);
  if (group->arrived > 0 && group->operation != &operation) {
    Fail("threads of one warpgroup have diverged: some are at %s, this one is at %s", group->operation->name, operation.name);
  }
  group->operation = &operation;
  group->operands[me->index - first] = operands;
  if (++group->arrived < kGroup) return Wait(me, operation.name, 0);
  operation.perform(group->operands, kAllLanes);
  group->arrived = 0;
  for (unsigned w = first / kWarp; w < (first + kGroup) / kWarp; ++w) {
    if (block->warp[w].live != kAllLanes) Fail("%s needs all threads of the warpgroup, some have ended", operation.name);
    block->warp[w].ready = kAllLanes;
  }
  block->spins = 0;
  if (block->order == Order::kShuffled) Yield();
}

void WaitAt(uint32_t address, const char* what) {
  Fiber* me = current;
  me->block->waiting_at.emplace_back(address, me);
  Wait(me, what, static_cast<int>(address));
}

void WakeAt(uint32_t address) {
  Block* block = current->block;
  auto& waiting = block->waiting_at;
  size_t kept = 0;
  for (const auto& [where, fiber] : waiting) {
    if (where == address) {
      fiber->warp->ready |= 1u << fiber->lane;
    } else {
      waiting[kept++] = {where, fiber};
    }
  }
  waiting.resize(kept);
  block->spins = 0;
}

void Begin(Event event) {
  event.fiber = current;
  current->block->events.push_back(event);
}

uint32_t ActiveMask() { return current->warp->live; }

}  // namespace emulator
