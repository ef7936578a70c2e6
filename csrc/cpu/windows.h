// Where pooling windows lie: the taps of a window inside the map, and the windows that contain a pixel.
#pragma once

#include "tensors.h"

#include <vector>

namespace fastconv {

// Taps [begin, end) of a window along one dimension; tap t is pixel `start + t * dilation`.
struct Taps {
  int64_t begin, end, start;
};

// One dimension of a pooling.
struct Axis {
  int64_t size, windows, kernel, stride, padding, dilation;

  FASTCONV_INLINE Taps taps(int64_t window) const {
    const int64_t start = window * stride - padding;
    const int64_t begin = start < 0 ? ceil_div(-start, dilation) : 0;
    const int64_t room = size - start;
    const int64_t end = std::min(kernel, ceil_div(room, dilation));
    return {begin, std::max(begin, end), start};
  }

  // The windows [begin, end) that reach over a pixel; with dilation not all of them have a tap on it.
  FASTCONV_INLINE int64_t first_window(int64_t pixel) const {
    const int64_t beyond = pixel + padding - dilation * (kernel - 1);
    return beyond > 0 ? ceil_div(beyond, stride) : 0;
  }

  FASTCONV_INLINE int64_t last_window(int64_t pixel) const { return std::min(windows, (pixel + padding) / stride + 1); }

  // The tap of a window on a pixel, or -1.
  FASTCONV_INLINE int64_t tap_on(int64_t pixel, int64_t window) const {
    const int64_t offset = pixel + padding - window * stride;
    if (dilation == 1) return offset < 0 || offset >= kernel ? -1 : offset;  // spares two divisions
    if (offset < 0 || offset % dilation != 0 || offset / dilation >= kernel) return -1;
    return offset / dilation;
  }

  // The pixels [begin, end) nearest to a window, such that windows share the whole map without overlap; the only ones
  // it can have taps on where windows do not overlap.
  FASTCONV_INLINE int64_t first_pixel(int64_t window) const {
    return window == 0 ? 0 : std::clamp<int64_t>(window * stride - padding, 0, size);
  }

  FASTCONV_INLINE int64_t last_pixel(int64_t window) const {
    return window == windows - 1 ? size : first_pixel(window + 1);
  }

  bool overlapping() const { return dilation * (kernel - 1) >= stride; }
};

struct Windows {
  int64_t batch, channels;
  Axis rows, columns;

  static Windows of(
      const Map& map, const Map& pooled, const std::vector<int64_t>& kernel, const std::vector<int64_t>& stride,
      const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation) {
    STD_TORCH_CHECK(
        map.batch == pooled.batch && map.channels == pooled.channels, "fastconv_native: a pooling keeps batch and channels");
    return {
        map.batch,
        map.channels,
        {map.height, pooled.height, kernel[0], stride[0], padding[0], dilation[0]},
        {map.width, pooled.width, kernel[1], stride[1], padding[1], dilation[1]}};
  }
};

}  // namespace fastconv
