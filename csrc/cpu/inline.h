// How kernels are inlined and vectorised.
#pragma once

#include <cstdint>

#define FASTCONV_INLINE inline __attribute__((always_inline))
// Lambdas do not inherit the target of the function around them, so theirs must be inlined too.
#define FASTCONV_INLINE_LAMBDA __attribute__((always_inline))
#if defined(__clang__)
#define FASTCONV_VECTORIZE _Pragma("clang loop vectorize(assume_safety)")
#else
#define FASTCONV_VECTORIZE _Pragma("GCC ivdep")
#endif

namespace fastconv {

// Kernels use it too: what they share with other code is always inlined, or the linker might keep their copy for all.
FASTCONV_INLINE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace fastconv
