// The kernels for AMX. What is inline and used by others too comes before the target.
#include "amx.h"

#if FASTCONV_AMX
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2,lzcnt,movbe"))), apply_to = function)
#if !defined(FASTCONV_AMX_EMULATED)
#pragma clang attribute push(__attribute__((target("amx-tile,amx-bf16,avx512bf16"))), apply_to = function)
#endif
#else
#pragma GCC target("avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2,lzcnt,movbe")
#if !defined(FASTCONV_AMX_EMULATED)
#pragma GCC target("amx-tile,amx-bf16,avx512bf16")
#endif
#endif
#define FASTCONV_ISA amx
#define FASTCONV_VECTOR_BYTES 64
#include "amx_conv.h"
#include "amx_weight_grad.h"
#if defined(__clang__)
#if !defined(FASTCONV_AMX_EMULATED)
#pragma clang attribute pop
#endif
#pragma clang attribute pop
#endif
#endif
