// The kernels of the instruction set that this process runs.
#pragma once

#include "../simd.h"
#include "kernels.h"

namespace fastconv {

template <class T>
const Kernels<T>& kernels() {
  const KernelsOfAllTypes* all = &vec128::kKernels;
#if defined(__x86_64__)
  if (instruction_set() == InstructionSet::kAvx2) all = &avx2::kKernels;
  if (instruction_set() == InstructionSet::kAvx512) all = &avx512::kKernels;
#endif
  if constexpr (std::is_same_v<T, float>) return *all->of_float;
  if constexpr (std::is_same_v<T, BFloat16>) return *all->of_bfloat16;
  if constexpr (std::is_same_v<T, Half>) return *all->of_half;
}

template <class T>
const FirstKernels<T>& first_kernels() {
#if defined(__x86_64__)
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (multiplies_bfloat16()) return avx512_bf16::kFirst;
  }
#endif
  return kernels<T>().first;
}

}  // namespace fastconv
