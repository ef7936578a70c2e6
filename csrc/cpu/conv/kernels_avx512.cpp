// The kernels for AVX512.
#include "../scalar.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2,lzcnt,movbe"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2,lzcnt,movbe")
#endif
#define FASTCONV_ISA avx512
#define FASTCONV_VECTOR_BYTES 64
#include "kernels.inc"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
