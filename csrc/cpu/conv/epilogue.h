// What becomes of a convolution's sums, whatever algorithm they come from.
#pragma once

#include "vec.h"

namespace fastconv::FASTCONV_ISA {

// The maximum of a 2×2 window, ReLU, and the winner's code: 0 where ReLU closed the window, else 1 to 4. As torch has it, the
// first of equal values wins, and the last NaN.
FASTCONV_INLINE V pool_window(const V* window, VI& code) {
  V best = window[0];
  VI winner = VI{} + 1;
#pragma GCC unroll 3
  for (int i = 1; i < 4; ++i) {
    const VI better = (window[i] > best) | (window[i] != window[i]);
    best = better ? window[i] : best;
    winner = better ? VI{} + (i + 1) : winner;
  }
  const VI closed = best <= 0;
  code = closed ? VI{} : winner;
  return closed ? V{} : best;
}

}  // namespace fastconv::FASTCONV_ISA
