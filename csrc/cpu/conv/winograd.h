// What a Winograd pass works on, for the kernels of every instruction set and for the code that shares the work out.
#pragma once

#include "conv3x3.h"

namespace fastconv {

// Tiles of the map that is written, of 4×4 pixels.
FASTCONV_INLINE int64_t tiles_h(const Conv3x3Sizes& s) { return ceil_div(s.out_height, 4); }
FASTCONV_INLINE int64_t tiles_w(const Conv3x3Sizes& s) { return ceil_div(s.out_width, 4); }
FASTCONV_INLINE int64_t count_tiles(const Conv3x3Sizes& s) { return s.batch * tiles_h(s) * tiles_w(s); }

// The tiles [first, first + count) of a pass.
struct Tiles {
  int64_t first, count;
};

// 36 matrices `plane` floats apart, of rows `row` floats apart. Strides that are no multiples of 4 KiB keep the 36 elements of
// a tile in different sets of the first cache.
struct Planes {
  float* data;
  int64_t row, plane;

  static Planes of(int64_t rows, int64_t columns) {
    const int64_t row = (columns + 15) / 16 * 16 + 16;
    return {nullptr, row, rows * row + 16};
  }
  static Planes packed(int64_t rows, int64_t columns) { return {nullptr, columns, rows * columns + 16}; }
  int64_t size() const { return 36 * plane; }
  Planes at(float* memory) const { return {memory, row, plane}; }
};

// The kernels of one instruction set for elements T. Panels are `panel` output channels; a `Planes` is memory of the caller.
template <class T>
struct WinogradKernels {
  int64_t panel;

  // The transformed filter from reduction channel r0 to r1 for the panel of outputs at `first`: rows [r1 − r0, panel].
  void (*filter)(const Conv3x3Filter<T>&, int64_t first, int64_t r0, int64_t r1, Planes u);

  // The transformed input [tiles, channels], with zeros for channels that fill a panel up.
  void (*input)(const Conv3x3Sizes&, const T* x, Tiles, Planes v);

  // m = v · u, rows [tiles, panel]; v and u begin at the same reduction channel, of which there are `k`.
  void (*multiply)(int64_t tiles, int64_t k, Planes v, Planes u, Planes m, bool add);

  // Outputs of a panel from `m`, with bias, residual, ReLU or pool.
  void (*output)(const Conv3x3Pass<T>&, Tiles, int64_t first, Planes m);

  // The transformed gradient [tiles, channels] of an output map (sizes.out_*).
  void (*grad)(const Conv3x3Sizes&, const T* grad, Tiles, Planes g);

  // s += gᵀ · v over tiles: rows [k, panel], for `k` channels of the gradient and a panel of input channels.
  void (*multiply_grad)(int64_t tiles, int64_t k, Planes g, Planes v, Planes s, bool add);

  // The weight gradient of output channels k0 to k1 and input channels c0 to c1, from the sum of `count` sets of planes,
  // `stride` floats apart, whose rows are [k1 - k0, panel].
  void (*filter_grad)(
      const Conv3x3WeightGrad<T>&, int64_t k0, int64_t k1, int64_t c0, int64_t c1, Planes s, int64_t count, int64_t stride);
};

}  // namespace fastconv
