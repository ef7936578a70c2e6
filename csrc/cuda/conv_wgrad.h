// Convolution's weight gradient by the engine of tile.h, in two passes: partial sums over runs of pixels, then their sums in
// order. No atomics: the same bits each time.
#pragma once

#include "operands.h"

namespace fastconv {

// sums[split, output channel, tap and input channel] of the pixels of a split.
template <class S, bool kVector>
__global__ void __launch_bounds__(S::kThreads, kResident<S, kVector>) weight_grad_kernel(const WeightGradParams p) {
  int block = blockIdx.x;
  const int across = block % p.tiles_across;
  block /= p.tiles_across;
  const int down = block % p.tiles_down;
  block /= p.tiles_down;
  const int group = block % p.groups, split = block / p.groups;
  const int first_row = down * S::kRows, first_column = across * S::kColumns;
  const int pixels = p.batch * p.out_height * p.out_width;
  const int first_pixel = split * p.split_steps * S::kDepth;
  const int steps_left = (pixels - first_pixel + S::kDepth - 1) / S::kDepth;
  Sums<S> sums;
  GradColumns<S, kVector> grad(p, group, first_row, first_pixel);
  PixelColumns<S, kVector> x(p, group, first_column, first_pixel);
  multiply_tiles<S>(sums, grad, x, steps_left < p.split_steps ? steps_left : p.split_steps);
  const Lane lane = Lane::of<S>();
  const int columns = p.kernel_h * p.kernel_w * p.channels;
  float* const output = p.sums + static_cast<int64_t>(split * p.groups + group) * p.out_channels * columns;
  FASTCONV_UNROLL
  for (int i = 0; i < S::kDown; ++i) {
    FASTCONV_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + lane.down + 16 * i + 8 * half + lane.group;
      if (row >= p.out_channels) continue;
      FASTCONV_UNROLL
      for (int j = 0; j < S::kAcross; ++j) {
        const int column = first_column + lane.across + 8 * j + 2 * lane.member;
        float* const to = output + static_cast<int64_t>(row) * columns + column;
        if (columns % 2 == 0 && column < columns) {
          store(to, Words2{{as_bits(sums[i][j][2 * half]), as_bits(sums[i][j][2 * half + 1])}});
          continue;
        }
        FASTCONV_UNROLL
        for (int e = 0; e < 2; ++e) {
          if (column + e < columns) store(to + e, sums[i][j][2 * half + e]);
        }
      }
    }
  }
}

}  // namespace fastconv
