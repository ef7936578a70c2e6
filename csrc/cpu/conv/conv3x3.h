// A 3×3 convolution of stride 1, as kernels see it: sizes, and pointers to NHWC memory.
#pragma once

#include "output.h"

#include <cstdint>

namespace fastconv {

// A forward pass, or an input gradient, which is the forward pass of the output's gradient with the filter turned by 180° and
// its channels exchanged.
struct Conv3x3Sizes {
  int64_t batch, height, width, channels;          // the map that is read
  int64_t out_height, out_width, out_channels;     // the map that is written
  int64_t pad_h, pad_w;
};

// Weights [K, 3, 3, C] in memory. Where `turned`, they map K channels to C.
template <class T>
struct Conv3x3Filter {
  const T* weight;
  int64_t rows, columns;  // K and C of memory
  bool turned;
};

template <class T>
struct Conv3x3Pass {
  Conv3x3Sizes sizes;
  const T* x;
  Conv3x3Filter<T> filter;
  ConvOutput<T> output;
};

template <class T>
struct Conv3x3WeightGrad {
  Conv3x3Sizes sizes;
  const T* x;
  const T* grad;
  T* weight_grad;  // [K, 3, 3, C]
};

}  // namespace fastconv
