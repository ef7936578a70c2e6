// The kernels for first layers in bfloat16 for AVX512 that multiplies pairs of them.
#include "../scalar.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512bf16,avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2,lzcnt,movbe"))), apply_to = function)
#else
#pragma GCC target("avx512bf16,avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2,lzcnt,movbe")
#endif
#define FASTCONV_ISA avx512_bf16
#define FASTCONV_VECTOR_BYTES 64
#define FASTCONV_PAIRS 1
#include "first_kernels.h"
#include "kernels.h"

namespace fastconv::avx512_bf16 {

const FirstKernels<BFloat16> kFirst = first_table<BFloat16>();

}  // namespace fastconv::avx512_bf16
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
