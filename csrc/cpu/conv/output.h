// Where a convolution's results go, and what is done to them on the way.
#pragma once

#include "../scalar.h"

#include <cstdint>

namespace fastconv {

template <class T>
struct ConvOutput {
  T* y;
  uint8_t* code;       // of the pool's winners, or null where there is no 2×2 pool
  const T* bias;       // or null
  const T* residual;   // or null
  bool relu;
  int64_t pooled_height, pooled_width;
};

}  // namespace fastconv
