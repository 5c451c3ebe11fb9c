// Signals while a launch runs: what they mean for a kernel.
#include "faults.h"

#include <ucontext.h>

#include <cstdio>
#include <iterator>
#include <mutex>

namespace emulator {
namespace {

constexpr int kSignals[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL};
struct sigaction before[std::size(kSignals)];
std::mutex signal_mutex;
int signal_users = 0;
__thread Worker* working = nullptr;

bool Writes(const void* context) {
#if defined(__x86_64__)
  return (static_cast<const ucontext_t*>(context)->uc_mcontext.gregs[REG_ERR] & 2) != 0;
#else
  (void)context;
  return false;
#endif
}

std::string Refused(int signal, const siginfo_t& info, const void* context) {
  if (signal == SIGFPE) return "an integer is divided by zero";
  if (signal == SIGILL) return "the kernel traps";
  if (signal == SIGSEGV && info.si_code == SI_KERNEL)
    return "an address is not a multiple of the vector's size, or no address at all";
  if (working->arena.Guards(info.si_addr)) return "an access beyond the end of the block's shared memory";
  if (info.si_addr >= working->stacks.begin() && info.si_addr < working->stacks.end()) {
    return "a thread needs more than " + std::to_string(kStackBytes >> 10) + " KiB of local memory";
  }
  char text[120];
  std::snprintf(text, sizeof text, "%s address %p, which is in no allocation", Writes(context) ? "writes to" : "reads",
                info.si_addr);
  working->block.fault = info.si_addr;
  return text;
}

// A fault of a kernel ends its block: the handler leaves for the worker and never comes back. Other faults are not ours.
void Handle(int signal, siginfo_t* info, void* context) {
  if (current == nullptr) {
    for (size_t i = 0; i < std::size(kSignals); ++i) {
      if (kSignals[i] == signal) sigaction(signal, &before[i], nullptr);
    }
    return;
  }
  Abandon(Refused(signal, *info, context));
}

}  // namespace

Handling::Handling() {
  std::lock_guard<std::mutex> lock(signal_mutex);
  if (signal_users++ > 0) return;
  struct sigaction action{};
  action.sa_sigaction = Handle;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  for (size_t i = 0; i < std::size(kSignals); ++i) sigaction(kSignals[i], &action, &before[i]);
}

Handling::~Handling() {
  std::lock_guard<std::mutex> lock(signal_mutex);
  if (--signal_users > 0) return;
  for (size_t i = 0; i < std::size(kSignals); ++i) sigaction(kSignals[i], &before[i], nullptr);
}

Working::Working(Worker* worker) : memory_(64 << 10) {
  stack_t mine{};
  mine.ss_sp = memory_.data();
  mine.ss_size = memory_.size();
  sigaltstack(&mine, &before_);
  working = worker;
}

Working::~Working() {
  working = nullptr;
  sigaltstack(&before_, nullptr);
}

}  // namespace emulator
