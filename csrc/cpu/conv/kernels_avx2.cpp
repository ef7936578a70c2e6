// The kernels for AVX2.
#include "../scalar.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi,bmi2,lzcnt,movbe"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,lzcnt,movbe")
#endif
#define FASTCONV_ISA avx2
#define FASTCONV_VECTOR_BYTES 32
#include "kernels.inc"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
