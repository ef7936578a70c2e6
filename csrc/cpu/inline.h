// How kernels are inlined and vectorised.
#pragma once

#define FASTCONV_INLINE inline __attribute__((always_inline))
// Lambdas do not inherit the target of the function around them, so theirs must be inlined too.
#define FASTCONV_INLINE_LAMBDA __attribute__((always_inline))
#if defined(__clang__)
#define FASTCONV_VECTORIZE _Pragma("clang loop vectorize(assume_safety)")
#else
#define FASTCONV_VECTORIZE _Pragma("GCC ivdep")
#endif
