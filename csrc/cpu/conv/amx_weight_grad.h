// Weight gradients: the gradient turned times the input in pairs of pixels.
#pragma once

#include "amx_conv.h"

namespace fastconv::FASTCONV_ISA {

// The factors of a product of [32 output channels, pixels] and [pixels, 32 input channels], in pieces that are summed.
struct Factors {
  const BFloat16 *turned, *paired;
  int64_t pixels, half;                 // half: elements of `paired` from 16 input channels to the next 16
  int64_t pieces, next_turned, next_paired;
};

// sums [32, 32], rows `stride` floats apart, are set or added to.
FASTCONV_INLINE void multiply(const Factors& factors, bool add, float* sums, int64_t stride) {
  const int64_t row = stride * sizeof(float);
  float* const lower = sums + kTileRows * stride;
  if (add) {
    load_tile<0>(sums, row);
    load_tile<1>(sums + kWidth, row);
    load_tile<2>(lower, row);
    load_tile<3>(lower + kWidth, row);
  } else {
    zero_tile<0>();
    zero_tile<1>();
    zero_tile<2>();
    zero_tile<3>();
  }
  for (int64_t piece = 0; piece < factors.pieces; ++piece) {
    const BFloat16* a = factors.turned + piece * factors.next_turned;
    const BFloat16* b = factors.paired + piece * factors.next_paired;
    for (int64_t p = 0; p < factors.pixels; p += kBlock) {
      load_tile<6>(b, kTileBytes);
      load_tile<4>(a, kTileBytes);
      multiply_tiles<0, 4, 6>();
      load_tile<7>(b + factors.half, kTileBytes);
      multiply_tiles<1, 4, 7>();
      load_tile<5>(a + kTileElements, kTileBytes);
      multiply_tiles<2, 5, 6>();
      multiply_tiles<3, 5, 7>();
      a += kBlockElements;
      b += kTileElements;
    }
  }
  store_tile<0>(sums, row);
  store_tile<1>(sums + kWidth, row);
  store_tile<2>(lower, row);
  store_tile<3>(lower + kWidth, row);
}

// One row of pairs of input pixels, null ones zero: 16 channels of it, and 16 more `half` elements on.
FASTCONV_INLINE void store_pair(const BFloat16* a, const BFloat16* b, int64_t count, int64_t half, BFloat16* to) {
  Row low, high;
  pair_rows(a == nullptr ? Row{} : load_row(a, count), b == nullptr ? Row{} : load_row(b, count), low, high);
  store_row(to, low);
  store_row(to + half, high);
}

// Sums of a block, rounded; rows of the weight gradient are `row` elements apart.
FASTCONV_INLINE void round_gradient(const float* sums, int64_t stride, int64_t rows, int64_t columns, BFloat16* to, int64_t row) {
  for (int64_t k = 0; k < rows; ++k) {
    for (int64_t c = 0; c < columns; c += kWidth) {
      store_rounded(to + k * row + c, load(sums + k * stride + c), least(kWidth, columns - c));
    }
  }
}

// ---- by taps

void turn_grad(const WeightGrad& pass, const Taps& plan, int64_t block, int64_t first, int64_t count, BFloat16* turned) {
  const int64_t channels = pass.sizes.out_channels, k = block * kBlock;
  for (int64_t p = 0; p < count; p += kBlock, turned += kBlockElements) {
    const BFloat16* rows[kBlock];
    for (int64_t i = 0; i < kBlock; ++i) {
      rows[i] = first + p + i < plan.pixels ? pass.grad + (first + p + i) * channels + k : nullptr;
    }
    turn_rows(rows, least(kBlock, channels - k), turned);
  }
}

void add_tap(
    const WeightGrad& pass, const Taps& plan, int64_t unit, int64_t first, const BFloat16* turned, BFloat16* paired,
    float* sums) {
  const Conv3x3Sizes& s = pass.sizes;
  const int64_t tap = unit / plan.parts, c0 = unit % plan.parts * plan.part, channels = least(plan.part, s.channels - c0);
  const int64_t count = least(plan.chunk, plan.pixels - first), pixels = blocks(count) * kBlock, half = pixels / 2 * kBlock;

  int64_t row = first / s.out_width % s.out_height, column = first % s.out_width, image = first / s.out_width / s.out_height;
  for (int64_t p = 0; p < pixels; p += 2) {
    const BFloat16* pair[2];
    for (int i = 0; i < 2; ++i) {
      const int64_t h = row + tap / 3 - s.pad_h, w = column + tap % 3 - s.pad_w;
      const bool inside = p + i < count && h >= 0 && w >= 0 && h < s.height && w < s.width;
      pair[i] = inside ? pass.x + ((image * s.height + h) * s.width + w) * s.channels + c0 : nullptr;
      if (++column == s.out_width) {
        column = 0;
        if (++row == s.out_height) {
          row = 0;
          ++image;
        }
      }
    }
    for (int64_t c = 0; c < channels; c += kBlock) {
      const BFloat16 *const a = pair[0] == nullptr ? nullptr : pair[0] + c, *const b = pair[1] == nullptr ? nullptr : pair[1] + c;
      store_pair(a, b, least(kBlock, channels - c), half, paired + c / kBlock * 2 * half + p / 2 * kBlock);
    }
  }

  const TilesInUse use;
  const bool last = first + count == plan.pixels;
  const int64_t all_k = blocks(s.out_channels) * kBlock, all_c = blocks(s.channels) * kBlock;
  alignas(64) float block[kBlock * kBlock];
  for (int64_t c = 0; c < channels; c += kBlock) {
    for (int64_t k = 0; k < s.out_channels; k += kBlock) {
      float* const to = sums == nullptr ? block : sums + (tap * all_k + k) * all_c + c0 + c;
      const int64_t stride = sums == nullptr ? kBlock : all_c;
      multiply({turned + k * plan.chunk, paired + c / kBlock * 2 * half, pixels, half, 1, 0, 0}, first > 0, to, stride);
      if (!last) continue;
      round_gradient(
          to, stride, least(kBlock, s.out_channels - k), least(kBlock, channels - c),
          pass.weight_grad + (k * 9 + tap) * s.channels + c0 + c, 9 * s.channels);
    }
  }
}

// ---- by shifts

// The gradient of a piece at every position, zero at those beside the map.
inline void turn_piece(const WeightGrad& pass, const Shifts& plan, int64_t image, int64_t first, int64_t rows, BFloat16* turned) {
  const Conv3x3Sizes& s = pass.sizes;
  int64_t row = 0, column = 0;
  for (int64_t p = 0; p < plan.positions; p += kBlock) {
    const BFloat16* pixels[kBlock];
    for (int64_t i = 0; i < kBlock; ++i) {
      const bool inside = row < rows && column < s.out_width;
      pixels[i] = inside ? pass.grad + ((image * s.out_height + first + row) * s.out_width + column) * s.out_channels : nullptr;
      if (++column == plan.pitch) {
        column = 0;
        ++row;
      }
    }
    for (int64_t k = 0; k < s.out_channels; k += kBlock) {
      turn_rows(pixels, least(kBlock, s.out_channels - k), turned + k * plan.positions + p * kBlock);
      for (const BFloat16*& pixel : pixels) pixel = pixel == nullptr ? nullptr : pixel + kBlock;
    }
  }
}

// The input of a piece in pairs of positions: from an even one on, and from an odd one on.
inline void pair_piece(const WeightGrad& pass, const Shifts& plan, int64_t image, int64_t first, int64_t rows, BFloat16* paired) {
  const Conv3x3Sizes& s = pass.sizes;
  const int64_t half = plan.pairs * kBlock, phase = 2 * blocks(s.channels) * half;
  int64_t row = 0, column = 0;
  const auto next = [&]() FASTCONV_INLINE_LAMBDA {
    const int64_t h = first + row - s.pad_h, w = column - s.pad_w;
    const bool inside = row < rows + 2 && h >= 0 && w >= 0 && h < s.height && w < s.width;
    if (++column == plan.pitch) {
      column = 0;
      ++row;
    }
    return inside ? pass.x + ((image * s.height + h) * s.width + w) * s.channels : nullptr;
  };
  const BFloat16* last = next();
  for (int64_t pair = 0; pair < plan.pairs; ++pair) {
    const BFloat16 *a = last, *b = next();
    last = next();
    const BFloat16* c = last;
    for (int64_t channel = 0; channel < s.channels; channel += kBlock) {
      const int64_t count = least(kBlock, s.channels - channel);
      BFloat16* const to = paired + channel / kBlock * 2 * half + pair * kBlock;
      store_pair(a, b, count, half, to);
      store_pair(b, c, count, half, to + phase);
      a = a == nullptr ? nullptr : a + kBlock;
      b = b == nullptr ? nullptr : b + kBlock;
      c = c == nullptr ? nullptr : c + kBlock;
    }
  }
}

void sum_run(const WeightGrad& pass, const Shifts& plan, int64_t run, BFloat16* turned, BFloat16* paired, float* sums) {
  const Conv3x3Sizes& s = pass.sizes;
  const int64_t end = plan.pieces * (run + 1) / plan.runs, start = plan.pieces * run / plan.runs;
  const int64_t all_k = blocks(s.out_channels) * kBlock, all_c = blocks(s.channels) * kBlock;
  const int64_t half = plan.pairs * kBlock, phase = 2 * blocks(s.channels) * half;
  const TilesInUse use;
  for (int64_t piece = start; piece < end; piece += plan.together) {
    const int64_t count = least(plan.together, end - piece);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t image = (piece + i) / plan.bands, first = (piece + i) % plan.bands * plan.rows;
      const int64_t rows = least(plan.rows, s.out_height - first);
      turn_piece(pass, plan, image, first, rows, turned + i * plan.turned(s));
      pair_piece(pass, plan, image, first, rows, paired + i * plan.paired(s));
    }
    for (int64_t k = 0; k < s.out_channels; k += kBlock) {
      for (int64_t tap = 0; tap < 9; ++tap) {
        const int64_t shift = tap / 3 * plan.pitch + tap % 3;
        for (int64_t c = 0; c < s.channels; c += kBlock) {
          const BFloat16* const from = paired + shift % 2 * phase + c / kBlock * 2 * half + shift / 2 * kBlock;
          multiply(
              {turned + k * plan.positions, from, plan.positions, half, count, plan.turned(s), plan.paired(s)}, piece > start,
              sums + (tap * all_k + k) * all_c + c, all_c);
        }
      }
    }
  }
}

void add_runs(const WeightGrad& pass, const Shifts& plan, int64_t k, const float* sums) {
  const Conv3x3Sizes& s = pass.sizes;
  const int64_t all_k = blocks(s.out_channels) * kBlock, all_c = blocks(s.channels) * kBlock, set = gradient_sums(s);
  for (int64_t tap = 0; tap < 9; ++tap) {
    for (int64_t c = 0; c < s.channels; c += kWidth) {
      const float* const from = sums + (tap * all_k + k) * all_c + c;
      V sum = load(from);
      for (int64_t run = 1; run < plan.runs; ++run) sum = sum + load(from + run * set);
      store_rounded(pass.weight_grad + (k * 9 + tap) * s.channels + c, sum, least(kWidth, s.channels - c));
    }
  }
}

}  // namespace fastconv::FASTCONV_ISA
