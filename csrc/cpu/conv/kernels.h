// The kernels of each instruction set.
#pragma once

#include "first.h"
#include "winograd.h"

namespace fastconv {

template <class T>
struct Kernels {
  WinogradKernels<T> winograd;
  FirstKernels<T> first;
};

struct KernelsOfAllTypes {
  const Kernels<float>* of_float;
  const Kernels<BFloat16>* of_bfloat16;
  const Kernels<Half>* of_half;
};

#if defined(__x86_64__)
namespace avx512_bf16 {
extern const FirstKernels<BFloat16> kFirst;
}
namespace avx512 {
extern const KernelsOfAllTypes kKernels;
}
namespace avx2 {
extern const KernelsOfAllTypes kKernels;
}
#endif
namespace vec128 {
extern const KernelsOfAllTypes kKernels;
}

}  // namespace fastconv
