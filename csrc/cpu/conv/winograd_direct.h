// What Winograd's transforms cannot give: they spread a NaN or an infinity over its tile, and large values can overflow on the
// way. Where a result is not finite it is summed again, product by product.
#pragma once

#include "vec.h"
#include "winograd.h"

namespace fastconv::FASTCONV_ISA {

// The weights of a tap and a reduction channel for `count` outputs from `first` on.
template <class T>
FASTCONV_INLINE V weights_of(const Conv3x3Filter<T>& f, int64_t tap, int64_t channel, int64_t first, int64_t count) {
  if (f.turned) return load(f.weight + (channel * 9 + 8 - tap) * f.columns + first, count);
  float lanes[kWidth] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i] = fastconv::load(f.weight[((first + i) * 9 + tap) * f.columns + channel]);
  return load(lanes);
}

// The output of one pixel (before bias) for `count` channels from `first` on.
template <class T>
__attribute__((noinline)) V direct_output(
    const Conv3x3Pass<T>& pass, int64_t image, int64_t row, int64_t column, int64_t first, int64_t count) {
  const Conv3x3Sizes& s = pass.sizes;
  V sum{};
  for (int64_t tap = 0; tap < 9; ++tap) {
    const int64_t h = row + tap / 3 - s.pad_h, w = column + tap % 3 - s.pad_w;
    if (h < 0 || w < 0 || h >= s.height || w >= s.width) continue;
    const T* const x = pass.x + ((image * s.height + h) * s.width + w) * s.channels;
    for (int64_t c = 0; c < s.channels; ++c) sum = fma(fastconv::load(x[c]), weights_of(pass.filter, tap, c, first, count), sum);
  }
  return sum;
}

// The gradient of one tap of output channel k for `count` input channels from `first` on.
template <class T>
__attribute__((noinline)) V direct_weight_grad(
    const Conv3x3WeightGrad<T>& pass, int64_t k, int64_t tap, int64_t first, int64_t count) {
  const Conv3x3Sizes& s = pass.sizes;
  V sum{};
  for (int64_t image = 0; image < s.batch; ++image) {
    for (int64_t row = 0; row < s.out_height; ++row) {
      const int64_t h = row + tap / 3 - s.pad_h;
      if (h < 0 || h >= s.height) continue;
      for (int64_t column = 0; column < s.out_width; ++column) {
        const int64_t w = column + tap % 3 - s.pad_w;
        if (w < 0 || w >= s.width) continue;
        const float grad = fastconv::load(pass.grad[((image * s.out_height + row) * s.out_width + column) * s.out_channels + k]);
        sum = fma(grad, load(pass.x + ((image * s.height + h) * s.width + w) * s.channels + first, count), sum);
      }
    }
  }
  return sum;
}

}  // namespace fastconv::FASTCONV_ISA
