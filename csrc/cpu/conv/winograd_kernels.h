// Winograd's passes over tiles: transforms of filter, input and gradient, their products, and what becomes of these.
#pragma once

#include "epilogue.h"
#include "product.h"
#include "winograd.h"
#include "winograd_direct.h"
#include "winograd_transforms.h"

namespace fastconv::FASTCONV_ISA {

// The first output pixel of a tile.
struct Corner {
  int64_t image, row, column;
};

FASTCONV_INLINE Corner corner(const Conv3x3Sizes& s, int64_t tile) {
  const int64_t columns = tiles_w(s), of_image = tiles_h(s) * columns;
  const int64_t rest = tile % of_image;
  return {tile / of_image, rest / columns * kTile, rest % columns * kTile};
}

// A square of `side`² pixels of a map of `channels` from `row`, `column` on; zeros where it hangs over.
template <int side, class T>
FASTCONV_INLINE void load_square(
    const T* image, int64_t height, int64_t width, int64_t channels, int64_t row, int64_t column, int64_t count, V* square) {
  const T* const first = image + (row * width + column) * channels;
  if (row >= 0 && column >= 0 && row + side <= height && column + side <= width && count == kWidth) {
#pragma GCC unroll 6
    for (int i = 0; i < side; ++i) {
#pragma GCC unroll 6
      for (int j = 0; j < side; ++j) square[i * side + j] = load(first + (i * width + j) * channels);
    }
    return;
  }
#pragma GCC unroll 1
  for (int i = 0; i < side; ++i) {
#pragma GCC unroll 1
    for (int j = 0; j < side; ++j) {
      const bool inside = row + i >= 0 && row + i < height && column + j >= 0 && column + j < width;
      square[i * side + j] = inside ? load(first + (i * width + j) * channels, count) : V{};
    }
  }
}

FASTCONV_INLINE void store_points(const V* points, Planes to, int64_t row, int64_t column) {
  float* const p = to.data + row * to.row + column;
#pragma GCC unroll 36
  for (int i = 0; i < kPoints; ++i) store(p + i * to.plane, points[i]);
}

template <class T>
void transform_filter(const Conv3x3Filter<T>& f, int64_t first, int64_t r0, int64_t r1, Planes u) {
  const int64_t outputs = f.turned ? f.columns : f.rows;
  for (int64_t half = 0; half < kPanel; half += kWidth) {
    const int64_t count = least(kWidth, outputs - first - half);
    if (count <= 0) {
      const V zeros[kPoints] = {};
      for (int64_t r = r0; r < r1; ++r) store_points(zeros, u, r - r0, half);
    } else if (f.turned) {
      for (int64_t r = r0; r < r1; ++r) {
        V taps[9], points[kPoints];
        for (int t = 0; t < 9; ++t) taps[t] = load(f.weight + (r * 9 + 8 - t) * f.columns + first + half, count);
        transform<FilterTransform>(taps, points);
        store_points(points, u, r - r0, half);
      }
    } else {
      for (int64_t r = r0; r < r1; r += kWidth) {
        const int64_t rows = least(kWidth, r1 - r);
        V taps[9][kWidth];  // [tap, channel], a lane for each output, once transposed
        for (int t = 0; t < 9; ++t) {
          const T* const weight = f.weight + ((first + half) * 9 + t) * f.columns + r;
          for (int64_t k = 0; k < kWidth; ++k) taps[t][k] = k < count ? load(weight + k * 9 * f.columns, rows) : V{};
          transpose(taps[t]);
        }
        for (int64_t c = 0; c < rows; ++c) {
          V filter[9], points[kPoints];
          for (int t = 0; t < 9; ++t) filter[t] = taps[t][c];
          transform<FilterTransform>(filter, points);
          store_points(points, u, r - r0 + c, half);
        }
      }
    }
  }
}

template <class T>
void transform_input(const Conv3x3Sizes& s, const T* x, Tiles tiles, Planes v) {
  const int64_t end = ceil_div(s.channels, kPanel) * kPanel;
  for (int64_t t = 0; t < tiles.count; ++t) {
    const Corner at = corner(s, tiles.first + t);
    const T* const image = x + at.image * s.height * s.width * s.channels;
    const bool ahead = at.row > 0 && at.row + kReach < s.height && at.column + kTile + kReach < s.width;
    for (int64_t c = 0; c < end; c += kWidth) {
      V points[kPoints] = {};
      if (ahead) {
        const T* const next = image + ((at.row - s.pad_h) * s.width + at.column + kReach - s.pad_w) * s.channels + c;
#pragma GCC unroll 6
        for (int i = 0; i < kReach; ++i) {
#pragma GCC unroll 4
          for (int j = 0; j < kTile; ++j) __builtin_prefetch(next + (i * s.width + j) * s.channels);
        }
      }
      if (c < s.channels) {
        const int64_t count = least(kWidth, s.channels - c);
        V square[kPoints];
        load_square<kReach>(image + c, s.height, s.width, s.channels, at.row - s.pad_h, at.column - s.pad_w, count, square);
        transform<InputTransform>(square, points);
      }
      store_points(points, v, t, c);
    }
  }
}

template <class T>
void transform_grad(const Conv3x3Sizes& s, const T* grad, Tiles tiles, Planes g) {
  for (int64_t t = 0; t < tiles.count; ++t) {
    const Corner at = corner(s, tiles.first + t);
    const T* const image = grad + at.image * s.out_height * s.out_width * s.out_channels;
    for (int64_t k = 0; k < s.out_channels; k += kWidth) {
      const int64_t count = least(kWidth, s.out_channels - k);
      V square[kTile * kTile], points[kPoints];
      load_square<kTile>(image + k, s.out_height, s.out_width, s.out_channels, at.row, at.column, count, square);
      transform<GradTransform>(square, points);
      store_points(points, g, t, k);
    }
  }
}

inline void multiply(int64_t tiles, int64_t k, Planes v, Planes u, Planes m, bool add) {
  for (int i = 0; i < kPoints; ++i) {
    const Strided a{v.data + i * v.plane, v.row, 1};
    product(a, u.data + i * u.plane, u.row, m.data + i * m.plane, m.row, tiles, k, add);
  }
}

inline void multiply_grad(int64_t tiles, int64_t k, Planes g, Planes v, Planes s, bool add) {
  for (int i = 0; i < kPoints; ++i) {
    const Strided a{g.data + i * g.plane, 1, g.row};
    product(a, v.data + i * v.plane, v.row, s.data + i * s.plane, s.row, k, tiles, add);
  }
}

template <class T>
FASTCONV_INLINE void write_pooled(
    const ConvOutput<T>& out, const Conv3x3Sizes& s, const Corner& at, int64_t k, int64_t count, const V* values) {
  for (int i = 0; i < kTile; i += 2) {
    for (int j = 0; j < kTile; j += 2) {
      const int64_t row = (at.row + i) / 2, column = (at.column + j) / 2;
      if (row >= out.pooled_height || column >= out.pooled_width) continue;
      V window[4];
      for (int tap = 0; tap < 4; ++tap) {
        const int h = i + tap / 2, w = j + tap % 2;
        const bool inside = at.row + h < s.out_height && at.column + w < s.out_width;  // a window of ceil_mode hangs over
        window[tap] = inside ? values[h * kTile + w] : splat(-__builtin_inff());
      }
      VI code;
      const V value = pool_window(window, code);
      const int64_t to = ((at.image * out.pooled_height + row) * out.pooled_width + column) * s.out_channels + k;
      store(out.y + to, value, count);
      store_codes(out.code + to, code, count);
    }
  }
}

template <class T>
FASTCONV_INLINE void write_tile(
    const ConvOutput<T>& out, const Conv3x3Sizes& s, const Corner& at, int64_t k, int64_t count, V* values) {
  const int64_t rows = least(kTile, s.out_height - at.row), columns = least(kTile, s.out_width - at.column);
  const int64_t first = ((at.image * s.out_height + at.row) * s.out_width + at.column) * s.out_channels + k;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) {
      const int64_t to = first + (i * s.out_width + j) * s.out_channels;
      V value = values[i * kTile + j];
      if (out.residual != nullptr) value = value + load(out.residual + to, count);
      store(out.y + to, out.relu ? relu(value) : value, count);
    }
  }
}

template <class T>
void write_output(const Conv3x3Pass<T>& pass, Tiles tiles, int64_t first, Planes m) {
  const Conv3x3Sizes& s = pass.sizes;
  for (int64_t t = 0; t < tiles.count; ++t) {
    const Corner at = corner(s, tiles.first + t);
    for (int64_t half = 0; half < kPanel && first + half < s.out_channels; half += kWidth) {
      const int64_t k = first + half, count = least(kWidth, s.out_channels - k);
      V points[kPoints], values[kTile * kTile];
#pragma GCC unroll 36
      for (int i = 0; i < kPoints; ++i) points[i] = load(m.data + i * m.plane + t * m.row + half);
      transform<OutputTransform>(points, values);
      V finite{};  // 0, or NaN where a value is not finite
#pragma GCC unroll 16
      for (int i = 0; i < kTile * kTile; ++i) finite = fma(values[i], V{}, finite);
      if (__builtin_expect(any_nan(finite), 0)) {
        for (int i = 0; i < kTile * kTile; ++i) {
          const int64_t row = at.row + i / kTile, column = at.column + i % kTile;
          if (row < s.out_height && column < s.out_width) values[i] = direct_output(pass, at.image, row, column, k, count);
        }
      }
      if (pass.output.bias != nullptr) {
        const V bias = load(pass.output.bias + k, count);
#pragma GCC unroll 16
        for (int i = 0; i < kTile * kTile; ++i) values[i] = values[i] + bias;
      }
      if (pass.output.code != nullptr) {
        write_pooled(pass.output, s, at, k, count, values);
      } else {
        write_tile(pass.output, s, at, k, count, values);
      }
    }
  }
}

template <class T>
void write_filter_grad(
    const Conv3x3WeightGrad<T>& pass, int64_t k0, int64_t k1, int64_t c0, int64_t c1, Planes s, int64_t count,
    int64_t stride) {
  const int64_t channels = pass.sizes.channels;
  for (int64_t k = k0; k < k1; ++k) {
    for (int64_t c = c0; c < c1; c += kWidth) {
      const int64_t width = least(kWidth, c1 - c);
      V points[kPoints], taps[9];
      for (int i = 0; i < kPoints; ++i) {
        const float* const sums = s.data + i * s.plane + (k - k0) * s.row + (c - c0);
        points[i] = load(sums);
        for (int64_t set = 1; set < count; ++set) points[i] = points[i] + load(sums + set * stride);
      }
      transform<FilterGradTransform>(points, taps);
      V finite{};
      for (int t = 0; t < 9; ++t) finite = fma(taps[t], V{}, finite);
      const bool direct = any_nan(finite);
      for (int t = 0; t < 9; ++t) {
        if (__builtin_expect(direct, 0)) taps[t] = direct_weight_grad(pass, k, t, c, width);
        store(pass.weight_grad + (k * 9 + t) * channels + c, taps[t], width);
      }
    }
  }
}

template <class T>
constexpr WinogradKernels<T> winograd_table() {
  return {kPanel,          transform_filter<T>, transform_input<T>, multiply,
          write_output<T>, transform_grad<T>,   multiply_grad,      write_filter_grad<T>};
}

}  // namespace fastconv::FASTCONV_ISA
