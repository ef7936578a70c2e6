#include "simd.h"

#include <cstdlib>
#include <string_view>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace fastconv {

namespace {

#if defined(__x86_64__)
bool converts_float16() {  // F16C, whose name older compilers' __builtin_cpu_supports do not know
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & (1u << 29));
}
#endif

std::string_view limit() {
  const char* variable = std::getenv("ATEN_CPU_CAPABILITY");
  return variable == nullptr ? "" : variable;
}

InstructionSet of_processor() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
                    __builtin_cpu_supports("bmi2") && converts_float16();
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (avx512) return InstructionSet::kAvx512;
  if (avx2) return InstructionSet::kAvx2;
#endif
  return InstructionSet::kDefault;
}

InstructionSet allowed() {
  if (limit() == "default") return InstructionSet::kDefault;
  if (limit() == "avx2") return InstructionSet::kAvx2;
  return InstructionSet::kAvx512;
}

}  // namespace

InstructionSet instruction_set() {
  static const InstructionSet chosen = std::min(of_processor(), allowed());
  return chosen;
}

bool multiplies_bfloat16() {
#if defined(__x86_64__)
  static const bool allowed = instruction_set() == InstructionSet::kAvx512 && limit() != "avx512";
  static const bool supported = __builtin_cpu_supports("avx512bf16");
  return allowed && supported;
#else
  return false;
#endif
}

}  // namespace fastconv
