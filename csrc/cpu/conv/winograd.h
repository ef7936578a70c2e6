// What a Winograd pass works on, for the kernels of every instruction set and for the code that shares the work out.
#pragma once

#include "output.h"

#include <cstdint>

namespace fastconv {

// One 3×3 convolution of stride 1: a forward pass, or an input gradient, which is the forward pass of the output's gradient
// with the filter turned by 180° and its channels exchanged.
struct WinogradSizes {
  int64_t batch, height, width, channels;          // the map that is read
  int64_t out_height, out_width, out_channels;     // the map that is written
  int64_t pad_h, pad_w;

  int64_t tiles_h() const { return (out_height + 3) / 4; }
  int64_t tiles_w() const { return (out_width + 3) / 4; }
  int64_t tiles() const { return batch * tiles_h() * tiles_w(); }
};

// Weights [K, 3, 3, C] in memory. Where `turned`, they map K channels to C.
template <class T>
struct WinogradFilter {
  const T* weight;
  int64_t rows, columns;  // K and C of memory
  bool turned;
};

template <class T>
using WinogradOutput = ConvOutput<T>;

// A pass over tiles: what every unit of it reads and writes.
template <class T>
struct WinogradPass {
  WinogradSizes sizes;
  const T* x;
  WinogradFilter<T> filter;
  WinogradOutput<T> output;
};

template <class T>
struct WinogradWeightGrad {
  WinogradSizes sizes;
  const T* x;
  const T* grad;
  T* weight_grad;  // [K, 3, 3, C]
};

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
  void (*filter)(const WinogradFilter<T>&, int64_t first, int64_t r0, int64_t r1, Planes u);

  // The transformed input [tiles, channels], of channels c0 to c1 (c0 a multiple of 16).
  void (*input)(const WinogradSizes&, const T* x, Tiles, int64_t c0, int64_t c1, Planes v);

  // m = v · u, rows [tiles, panel]; v and u begin at the same reduction channel, of which there are `k`.
  void (*multiply)(int64_t tiles, int64_t k, Planes v, Planes u, Planes m, bool add);

  // Outputs of a panel from `m`, with bias, residual, ReLU or pool.
  void (*output)(const WinogradPass<T>&, Tiles, int64_t first, Planes m);

  // The transformed gradient [tiles, channels] of an output map (sizes.out_*), of channels k0 to k1.
  void (*grad)(const WinogradSizes&, const T* grad, Tiles, int64_t k0, int64_t k1, Planes g);

  // s += gᵀ · v over tiles: rows [k, panel], for `k` channels of the gradient and a panel of input channels.
  void (*multiply_grad)(int64_t tiles, int64_t k, Planes g, Planes v, Planes s, bool add);

  // The weight gradient of output channels k0 to k1 and input channels c0 to c1, from the sum of `count` sets of planes,
  // `stride` floats apart, whose rows are [k1 - k0, panel].
  void (*filter_grad)(
      const WinogradWeightGrad<T>&, int64_t k0, int64_t k1, int64_t c0, int64_t c1, Planes s, int64_t count, int64_t stride);
};

}  // namespace fastconv
