// Cooperative switching between stacks: a device thread is a fiber.
//
// On x86-64 a switch saves the six registers that calls preserve, in a few nanoseconds; elsewhere it is swapcontext, whose
// system call costs a hundred times as much.
#pragma once
#include <cstddef>
#include <cstdint>

#if defined(__x86_64__) && !defined(MOEGEN_EMULATOR_UCONTEXT)
#define MOEGEN_EMULATOR_ASSEMBLY 1
#else
#include <ucontext.h>
#endif

namespace emulator {

#ifdef MOEGEN_EMULATOR_ASSEMBLY

extern "C" void moegen_emulator_switch(void** save, void* load);

struct Context {
  void* stack = nullptr;
};

// `main` starts on the stack [bottom, top) when the context is switched to first. It never returns.
inline void Prepare(Context* context, void* bottom, void* top, void (*main)()) {
  (void)bottom;
  auto* frame = reinterpret_cast<uintptr_t*>(reinterpret_cast<uintptr_t>(top) & ~uintptr_t{15});
  *--frame = 0;                                  // where a call would have left its return address
  *--frame = reinterpret_cast<uintptr_t>(main);  // what the switch jumps to
  frame -= 6;
  context->stack = frame;
}

inline void Switch(Context* from, const Context& to) { moegen_emulator_switch(&from->stack, to.stack); }

#else

struct Context {
  ucontext_t state;
};

inline void Prepare(Context* context, void* bottom, void* top, void (*main)()) {
  getcontext(&context->state);
  context->state.uc_stack.ss_sp = bottom;
  context->state.uc_stack.ss_size = static_cast<size_t>(static_cast<char*>(top) - static_cast<char*>(bottom));
  context->state.uc_link = nullptr;
  makecontext(&context->state, main, 0);
}

inline void Switch(Context* from, const Context& to) { swapcontext(&from->state, &to.state); }

#endif

}  // namespace emulator
