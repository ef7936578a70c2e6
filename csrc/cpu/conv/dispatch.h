// The kernels of the instruction set that this process runs.
#pragma once

#include "../simd.h"
#include "kernels.h"

namespace fastconv {

inline const KernelsOfAllTypes& kernels_of_all_types() {
#if defined(__x86_64__)
  if (instruction_set() == InstructionSet::kAvx2) return avx2::kKernels;
  if (instruction_set() == InstructionSet::kAvx512) return avx512::kKernels;
#endif
  return vec128::kKernels;
}

template <class T>
const Kernels<T>& all_kernels() {
  if constexpr (std::is_same_v<T, float>) return *kernels_of_all_types().of_float;
  if constexpr (std::is_same_v<T, BFloat16>) return *kernels_of_all_types().of_bfloat16;
  if constexpr (std::is_same_v<T, Half>) return *kernels_of_all_types().of_half;
}

template <class T>
const WinogradKernels<T>& winograd_kernels() {
  return all_kernels<T>().winograd;
}

template <class T>
const FirstKernels<T>& first_kernels() {
#if defined(__x86_64__)
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (multiplies_bfloat16()) return avx512_bf16::kFirst;
  }
#endif
  return all_kernels<T>().first;
}

}  // namespace fastconv
