// Where pooling windows lie.
#pragma once

#include "tensors.h"

namespace fastconv {

// One dimension of a pooling.
struct WindowAxis {
  int size, windows, kernel, stride, padding, dilation;

  FASTCONV_DEVICE int pixel(int window, int tap) const { return window * stride - padding + tap * dilation; }
  // The windows [first_window, last_window] that reach over a pixel; with dilation not all of them have a tap on it.
  FASTCONV_DEVICE int first_window(int pixel) const {
    const int beyond = pixel + padding - dilation * (kernel - 1);
    return beyond > 0 ? (beyond + stride - 1) / stride : 0;
  }
  FASTCONV_DEVICE int last_window(int pixel) const {
    const int last = (pixel + padding) / stride;
    return last < windows ? last : windows - 1;
  }
  // The tap of a window on a pixel that it reaches over, or −1.
  FASTCONV_DEVICE int tap_on(int pixel, int window) const {
    const int offset = pixel + padding - window * stride;
    return offset % dilation == 0 ? offset / dilation : -1;
  }
};

struct Windows {
  WindowAxis rows, columns;

  static Windows of(
      const Map& map, const Map& pooled, const Pair& kernel, const Pair& stride, const Pair& padding, const Pair& dilation) {
    STD_TORCH_CHECK(
        map.batch == pooled.batch && map.channels == pooled.channels, "fastconv_native: a pooling keeps batch and channels");
    const auto axis = [&](int64_t size, int64_t windows, int i) {
      constexpr int64_t kMost = 1 << 30;
      STD_TORCH_CHECK(
          (windows - 1) * stride[i] + kernel[i] * dilation[i] < kMost && size < kMost,
          "fastconv_native: a window reaches too far");
      return WindowAxis{
          static_cast<int>(size),      static_cast<int>(windows),    static_cast<int>(kernel[i]),
          static_cast<int>(stride[i]), static_cast<int>(padding[i]), static_cast<int>(dilation[i])};
    };
    return {axis(map.height, pooled.height, 0), axis(map.width, pooled.width, 1)};
  }
};

// A pixel's image, row and column.
struct Position {
  int n, row, column;

  static FASTCONV_DEVICE Position of(int pixel, int height, int width) {
    return {pixel / width / height, pixel / width % height, pixel % width};
  }
};

FASTCONV_DEVICE int64_t pixel_of(int n, int row, int column, int height, int width) {
  return (static_cast<int64_t>(n) * height + row) * width + column;
}

}  // namespace fastconv
