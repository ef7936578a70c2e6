// Launches kernels in a stream, with a check behind every launch.
#pragma once

#include <torch/headeronly/util/Exception.h>

#ifndef FASTCONV_EMULATED
#include <cuda_runtime.h>
#endif

#include "device.h"

namespace fastconv {

#ifdef FASTCONV_EMULATED
using Stream = void*;
#else
using Stream = cudaStream_t;

inline void check(cudaError_t error) {
  STD_TORCH_CHECK(
      error == cudaSuccess, "fastconv_native: a CUDA kernel was not launched: ", cudaGetErrorString(error),
      " (fastconv info says which architectures were built; TORCH_CUDA_ARCH_LIST chooses them)");
}
#endif

// Kernels take one struct. No blocks are no launch.
template <class Params>
void launch(Stream stream, void (*kernel)(Params), int64_t blocks, int threads, int shared_bytes, const Params& params) {
  static_assert(sizeof(Params) > 16, "smaller structs are passed in registers, which tests that run PTX on a CPU do not");
  if (blocks == 0) return;
  STD_TORCH_CHECK(blocks < int64_t{1} << 31, "fastconv_native: ", blocks, " blocks are more than a launch can have");
#ifdef FASTCONV_EMULATED
  (void)stream;
  emu::launch(dim3(static_cast<unsigned>(blocks)), dim3(threads), shared_bytes, [&] { kernel(params); });
#else
  constexpr int kAlwaysAllowed = 48 << 10;
  if (shared_bytes > kAlwaysAllowed) {
    check(cudaFuncSetAttribute(
        reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  }
  kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes, stream>>>(params);
  check(cudaGetLastError());
#endif
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace fastconv
