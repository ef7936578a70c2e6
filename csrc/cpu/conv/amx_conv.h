// Forward convolutions and input gradients: tiles of pixels times packed filters, and what becomes of the sums.
#pragma once

#include "amx_pack.h"
#include "epilogue.h"

namespace fastconv::FASTCONV_ISA {

// How the pixels of a tile are read: elements from one to the next, from one block of channels to the next, to each tap.
struct Left {
  int64_t pixel, block, taps, blocks;
  int64_t tap[9];
};

// Sums [16 · tiles, 32] of one or two tiles of pixels and a panel of outputs.
template <int tiles>
FASTCONV_INLINE void multiply(
    const Left& left, const BFloat16* first, const BFloat16* second, const BFloat16* filter, float* sums, float* second_sums) {
  zero_tile<0>();
  zero_tile<1>();
  if constexpr (tiles == 2) {
    zero_tile<2>();
    zero_tile<3>();
  }
  const int64_t stride = left.pixel * 2;
  for (int64_t t = 0; t < left.taps; ++t) {
    const BFloat16 *a = first + left.tap[t], *b = second + left.tap[t];
    for (int64_t i = 0; i < left.blocks; ++i) {
      load_tile<6>(filter, kTileBytes);
      load_tile<4>(a, stride);
      multiply_tiles<0, 4, 6>();
      load_tile<7>(filter + kTileElements, kTileBytes);
      multiply_tiles<1, 4, 7>();
      if constexpr (tiles == 2) {
        load_tile<5>(b, stride);
        multiply_tiles<2, 5, 6>();
        multiply_tiles<3, 5, 7>();
      }
      a += left.block;
      b += left.block;
      filter += kBlockElements;
    }
  }
  constexpr int64_t kRow = kBlock * sizeof(float);
  store_tile<0>(sums, kRow);
  store_tile<1>(sums + kWidth, kRow);
  if constexpr (tiles == 2) {
    store_tile<2>(second_sums, kRow);
    store_tile<3>(second_sums + kWidth, kRow);
  }
}

// The outputs of a panel: first, count, and their bias.
struct Outputs {
  int64_t first, count;
  V bias[2];

  FASTCONV_INLINE static Outputs of(const Pass& pass, int64_t panel) {
    Outputs outputs{panel * kBlock, least(kBlock, pass.sizes.out_channels - panel * kBlock), {}};
    for (int half = 0; pass.output.bias != nullptr && half < outputs.halves(); ++half) {
      outputs.bias[half] = load(pass.output.bias + outputs.first + half * kWidth, outputs.width(half));
    }
    return outputs;
  }

  FASTCONV_INLINE int halves() const { return count > kWidth ? 2 : 1; }
  FASTCONV_INLINE int64_t width(int half) const { return least(kWidth, count - half * kWidth); }
};

FASTCONV_INLINE void store_rounded(BFloat16* p, V v, int64_t count) {
  const VH lanes = to_bfloat16(v);
  if (__builtin_expect(count == kWidth, 1)) {
    __builtin_memcpy(static_cast<void*>(p), &lanes, sizeof(lanes));
  } else {
    _mm256_mask_storeu_epi16(p, static_cast<__mmask16>((1u << count) - 1u), (__m256i)lanes);
  }
}

FASTCONV_INLINE void write_pixel(const Pass& pass, const Outputs& outputs, int64_t pixel, const float* sums) {
  const int64_t to = pixel * pass.sizes.out_channels + outputs.first;
  for (int half = 0; half < outputs.halves(); ++half) {
    const int64_t count = outputs.width(half);
    V value = load(sums + half * kWidth) + outputs.bias[half];
    if (pass.output.residual != nullptr) value = value + load(pass.output.residual + to + half * kWidth, count);
    store_rounded(pass.output.y + to + half * kWidth, pass.output.relu ? relu(value) : value, count);
  }
}

// `sums`: of the window's four pixels, null where it hangs over the map (ceil_mode).
FASTCONV_INLINE void write_window(const Pass& pass, const Outputs& outputs, int64_t window, const float* const (&sums)[4]) {
  const int64_t to = window * pass.sizes.out_channels + outputs.first;
  for (int half = 0; half < outputs.halves(); ++half) {
    V values[4];
    for (int i = 0; i < 4; ++i) {
      values[i] = sums[i] == nullptr ? splat(-__builtin_inff()) : load(sums[i] + half * kWidth) + outputs.bias[half];
    }
    VI code;
    const V value = pool_window(values, code);
    store_rounded(pass.output.y + to + half * kWidth, value, outputs.width(half));
    store_codes(pass.output.code + to + half * kWidth, code, outputs.width(half));
  }
}

// ---- bands

// Input rows from `row` on (of the map, from −pad_h), with zeros around and after.
inline void copy_band(const Pass& pass, int64_t image, int64_t row, int64_t rows, int64_t pitch, BFloat16* to) {
  const Conv3x3Sizes& s = pass.sizes;
  const int64_t width = blocks(s.channels) * kBlock, bytes = sizeof(BFloat16);
  const BFloat16* const x = pass.x + image * s.height * s.width * s.channels;
  for (int64_t i = 0; i < rows; ++i, to += pitch * width) {
    const int64_t h = row + i - s.pad_h;
    if (h < 0 || h >= s.height) {
      __builtin_memset(static_cast<void*>(to), 0, pitch * width * bytes);
      continue;
    }
    const BFloat16* const from = x + h * s.width * s.channels;
    BFloat16* const inside = to + s.pad_w * width;
    __builtin_memset(static_cast<void*>(to), 0, s.pad_w * width * bytes);
    __builtin_memset(static_cast<void*>(inside + s.width * width), 0, s.pad_w * width * bytes);
    if (width == s.channels) {
      __builtin_memcpy(static_cast<void*>(inside), from, s.width * width * bytes);
      continue;
    }
    for (int64_t w = 0; w < s.width; ++w) {
      __builtin_memcpy(static_cast<void*>(inside + w * width), from + w * s.channels, s.channels * bytes);
      __builtin_memset(static_cast<void*>(inside + w * width + s.channels), 0, (width - s.channels) * bytes);
    }
  }
  __builtin_memset(static_cast<void*>(to), 0, kTilePixels * width * bytes);
}

// The outputs of a strip of `rows` rows, whose sums lie `pitch` pixels a row.
inline void write_strip(
    const Pass& pass, const Outputs& outputs, int64_t image, int64_t row, int64_t rows, int64_t pitch, const float* sums) {
  const Conv3x3Sizes& s = pass.sizes;
  const ConvOutput<BFloat16>& out = pass.output;
  if (out.code == nullptr) {
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t pixel = (image * s.out_height + row + i) * s.out_width;
      for (int64_t w = 0; w < s.out_width; ++w) write_pixel(pass, outputs, pixel + w, sums + (i * pitch + w) * kBlock);
    }
    return;
  }
  for (int64_t i = 0; i < rows && (row + i) / 2 < out.pooled_height; i += 2) {
    const int64_t window = (image * out.pooled_height + (row + i) / 2) * out.pooled_width;
    for (int64_t w = 0; w < out.pooled_width; ++w) {
      const float* of[4];
      for (int64_t j = 0; j < 4; ++j) {
        const int64_t h = i + j / 2, v = 2 * w + j % 2;
        of[j] = row + h < s.out_height && v < s.out_width ? sums + (h * pitch + v) * kBlock : nullptr;
      }
      write_window(pass, outputs, window + w, of);
    }
  }
}

void conv_band(const Pass& pass, const Bands& plan, int64_t unit, const BFloat16* filters, BFloat16* copy, float* sums) {
  const Conv3x3Sizes& s = pass.sizes;
  const int64_t band = unit / plan.groups, group = unit % plan.groups, height = Bands::used_rows(pass);
  const int64_t image = band / plan.count, first = band % plan.count * plan.rows;
  const int64_t end = least(height, first + plan.rows), width = blocks(s.channels) * kBlock;
  copy_band(pass, image, first, end - first + 2, plan.pitch, copy);
  Left left{width, kBlock, 9, blocks(s.channels), {}};
  for (int64_t t = 0; t < 9; ++t) left.tap[t] = (t / 3 * plan.pitch + t % 3) * width;

  const TilesInUse use;
  for (int64_t row = first; row < end; row += plan.strip) {
    const int64_t rows = least(plan.strip, end - row);
    // Tiles lie one after the other over all positions of the strip, or begin anew at each row: whichever are fewer.
    // Positions they share have the same sums in both.
    int64_t in_line = (rows * plan.pitch - 2 + kTilePixels - 1) / kTilePixels, lines = 1;
    const int64_t in_row = (s.out_width + kTilePixels - 1) / kTilePixels;
    if (in_row * rows <= in_line) {
      in_line = in_row;
      lines = rows;
    }
    const auto position = [&](int64_t tile) FASTCONV_INLINE_LAMBDA {
      return tile / in_line * plan.pitch + tile % in_line * kTilePixels;
    };
    const BFloat16* const from = copy + (row - first) * plan.pitch * width;
    for (int64_t panel = panels(s) * group / plan.groups; panel < panels(s) * (group + 1) / plan.groups; ++panel) {
      const BFloat16* const filter = filters + panel * packed_panel(s);
      const int64_t tiles = in_line * lines;
      int64_t tile = 0;
      for (; tile + 1 < tiles; tile += 2) {
        const int64_t p = position(tile), q = position(tile + 1);
        multiply<2>(left, from + p * width, from + q * width, filter, sums + p * kBlock, sums + q * kBlock);
      }
      if (tile < tiles) {
        const int64_t p = position(tile);
        multiply<1>(left, from + p * width, from + p * width, filter, sums + p * kBlock, nullptr);
      }
      write_strip(pass, Outputs::of(pass, panel), image, row, rows, plan.pitch, sums);
    }
  }
}

// ---- gathered pixels

// A pixel of those that a pass gathers; of a pooled map, it may hang over.
struct Pixel {
  int64_t image, row, column;

  FASTCONV_INLINE static Pixel of(const Pass& pass, int64_t index) {
    const bool pooled = pass.output.code != nullptr;
    const int64_t width = pooled ? pass.output.pooled_width : pass.sizes.out_width;
    const int64_t height = pooled ? pass.output.pooled_height : pass.sizes.out_height;
    const int64_t tap = pooled ? index % 4 : 0, scale = pooled ? 2 : 1, place = pooled ? index / 4 : index;
    return {place / width / height, place / width % height * scale + tap / 2, place % width * scale + tap % 2};
  }

  FASTCONV_INLINE bool inside(const Conv3x3Sizes& s) const { return row < s.out_height && column < s.out_width; }
};

// The 9 neighbours of `count` pixels from `first` on, whole tiles of them.
inline void gather(const Pass& pass, int64_t first, int64_t count, BFloat16* left) {
  const Conv3x3Sizes& s = pass.sizes;
  const int64_t of_channels = blocks(s.channels);
  for (int64_t i = 0; i < (count + kTilePixels - 1) / kTilePixels * kTilePixels; ++i) {
    BFloat16* to = left + i / kTilePixels * 9 * of_channels * kTileElements + i % kTilePixels * kBlock;
    const Pixel pixel = Pixel::of(pass, first + i);
    for (int64_t t = 0; t < 9; ++t) {
      const int64_t h = pixel.row + t / 3 - s.pad_h, w = pixel.column + t % 3 - s.pad_w;
      const bool inside = i < count && pixel.inside(s) && h >= 0 && w >= 0 && h < s.height && w < s.width;
      const int64_t from = ((pixel.image * s.height + h) * s.width + w) * s.channels;
      for (int64_t c = 0; c < s.channels; c += kBlock, to += kTileElements) {
        store_row(to, inside ? load_row(pass.x + from + c, least(kBlock, s.channels - c)) : Row{});
      }
    }
  }
}

void conv_gathered(
    const Pass& pass, const Gathers& plan, int64_t unit, const BFloat16* filters, BFloat16* left_factor, float* sums) {
  const Conv3x3Sizes& s = pass.sizes;
  const int64_t first = unit / plan.groups * plan.tiles * kTilePixels, group = unit % plan.groups;
  const int64_t count = least(plan.pixels - first, plan.tiles * kTilePixels);
  const int64_t tiles = (count + kTilePixels - 1) / kTilePixels, of_tile = 9 * blocks(s.channels) * kTileElements;
  gather(pass, first, count, left_factor);
  const Left left{kBlock, kTileElements, 1, 9 * blocks(s.channels), {}};

  const TilesInUse use;
  for (int64_t panel = panels(s) * group / plan.groups; panel < panels(s) * (group + 1) / plan.groups; ++panel) {
    const BFloat16* const filter = filters + panel * packed_panel(s);
    int64_t tile = 0;
    for (; tile + 1 < tiles; tile += 2) {
      const BFloat16* const from = left_factor + tile * of_tile;
      float* const to = sums + tile * kTilePixels * kBlock;
      multiply<2>(left, from, from + of_tile, filter, to, to + kTilePixels * kBlock);
    }
    if (tile < tiles) {
      const BFloat16* const from = left_factor + tile * of_tile;
      multiply<1>(left, from, from, filter, sums + tile * kTilePixels * kBlock, nullptr);
    }
    const Outputs outputs = Outputs::of(pass, panel);
    if (pass.output.code == nullptr) {
      for (int64_t i = 0; i < count; ++i) write_pixel(pass, outputs, first + i, sums + i * kBlock);
      continue;
    }
    for (int64_t i = 0; i < count; i += 4) {
      const float* of[4];
      for (int64_t j = 0; j < 4; ++j) of[j] = Pixel::of(pass, first + i + j).inside(s) ? sums + (i + j) * kBlock : nullptr;
      write_window(pass, outputs, (first + i) / 4, of);
    }
  }
}

}  // namespace fastconv::FASTCONV_ISA
