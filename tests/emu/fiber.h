// Threads of control that hand over to each other: of their state only registers that a call must preserve are kept.
#pragma once

#ifndef __x86_64__
#include <ucontext.h>
#endif

#include <cstddef>
#include <cstdint>

namespace emu {

constexpr size_t kStackBytes = 256 << 10, kGuardBytes = 4096;

#ifdef __x86_64__
using Context = void*;  // the stack pointer, below it the registers

extern "C" void emu_switch(Context* from, Context to);
asm(R"(
.text
.local emu_switch
.type emu_switch, @function
emu_switch:
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
  ret
.size emu_switch, . - emu_switch
)");

inline void prepare(Context& context, uint8_t* stack, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + kStackBytes) - 2;  // the stack as behind a call
  top[0] = reinterpret_cast<void*>(entry);
  top[1] = nullptr;
  context = top - 6;
}
inline void switch_context(Context& from, Context& to) { emu_switch(&from, to); }
#else
using Context = ucontext_t;

inline void prepare(Context& context, uint8_t* stack, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = kStackBytes;
  makecontext(&context, entry, 0);
}
inline void switch_context(Context& from, Context& to) { swapcontext(&from, &to); }
#endif

}  // namespace emu
