// First layers: direct sums, a few pixels by a panel of output channels at a time, from rows of the image in float32 or, where
// the processor multiplies pairs of bfloat16, as they are.
//
// Kernel rows outside the map are left out. Beside the map stand zeros, which only a factor that is not finite would show: there,
// columns are left out too.
#pragma once

#include "epilogue.h"
#include "first.h"
#include "product.h"

namespace fastconv::FASTCONV_ISA {

constexpr int64_t kColumns = 2 * kRows;

// Of `limit` indices with a step of `stride` from `start` on, those inside [0, size).
struct Inside {
  int64_t begin, end;
};

FASTCONV_INLINE Inside inside(int64_t start, int64_t stride, int64_t limit, int64_t size) {
  const int64_t begin = start < 0 ? ceil_div(-start, stride) : 0;
  const int64_t end = size > start ? least(limit, ceil_div(size - start, stride)) : 0;
  return {least(begin, limit), most(end, least(begin, limit))};
}

#if FASTCONV_PAIRS
using FirstFactors = Pairs;
#else
using FirstFactors = Singles;
#endif
using FirstElement = FirstFactors::Element;

FASTCONV_INLINE int64_t first_steps(int64_t elements) { return ceil_div(elements, FirstFactors::kStep); }

// Rows of the image from `first` on with zeros at both sides; rows outside the map are not written, nor read later.
template <class T>
FASTCONV_INLINE void load_rows(const FirstSizes& s, const T* x, int64_t image, int64_t first, int64_t count, FirstElement* rows) {
  const int64_t beside = s.pad_w * s.channels, size = s.width * s.channels;
  const Inside of_map = inside(first, 1, count, s.height);
  for (int64_t i = of_map.begin; i < of_map.end; ++i) {
    const T* const from = x + (image * s.height + first + i) * size;
    FirstElement* const to = rows + i * s.padded();
    for (int64_t j = 0; j < beside; ++j) to[j] = to[beside + size + j] = {};
    if constexpr (std::is_same_v<T, FirstElement>) {
      __builtin_memcpy(to + beside, from, size * sizeof(T));
    } else {
      for (int64_t j = 0; j < size; j += kWidth) {
        const int64_t n = least(kWidth, size - j);
        store(to + beside + j, load(from + j, n), n);
      }
    }
  }
}

// The sums of `count` pixels of a row from `column` on, rows [pixel, panel]; `rows` begin with the first row of the window.
template <class T>
FASTCONV_INLINE void sum_pixels(
    const FirstPass<T>& pass, const FirstElement* rows, int64_t row, int64_t column, int64_t count, const float* filter,
    float* sums) {
  const FirstSizes& s = pass.sizes;
  const int64_t pixel = s.stride_w * s.channels, of_row = first_steps(s.run()) * kPanel;
  const Inside taps = inside(row * s.stride_h - s.pad_h, 1, s.kernel_h, s.height);
  if (__builtin_expect(pass.finite || s.pad_w == 0, 1)) {
    const StridedOf<FirstFactors> a{rows + taps.begin * s.padded() + column * pixel, pixel, FirstFactors::kStep};
    const Parts parts{taps.end - taps.begin, s.padded(), of_row};
    product_in_parts(a, filter + taps.begin * of_row, kPanel, sums, kPanel, count, s.run(), false, parts);
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    const Inside across = inside((column + i) * s.stride_w - s.pad_w, 1, s.kernel_w, s.width);
    V left{}, right{};
    for (int64_t kh = taps.begin; kh < taps.end; ++kh) {
      const FirstElement* const x = rows + kh * s.padded() + (column + i) * pixel;
      for (int64_t e = across.begin * s.channels; e < across.end * s.channels; ++e) {
        const float* const weights = filter + kh * of_row + e / FirstFactors::kStep * kPanel;
        const V factor = splat(fastconv::load(x[e]));
        left = fma(factor, FirstFactors::part(load(weights), e), left);
        right = fma(factor, FirstFactors::part(load(weights + kWidth), e), right);
      }
    }
    store(sums + i * kPanel, left);
    store(sums + i * kPanel + kWidth, right);
  }
}

template <class T>
FASTCONV_INLINE void write_pixels(
    const FirstPass<T>& pass, int64_t image, int64_t row, int64_t column, int64_t count, int64_t first, const float* sums) {
  const FirstSizes& s = pass.sizes;
  const ConvOutput<T> out = pass.output;
  const int64_t channels = s.out_channels, start = ((image * s.out_height + row) * s.out_width + column) * channels;
  for (int64_t half = 0; half < kPanel && first + half < channels; half += kWidth) {
    const int64_t k = first + half, n = least(kWidth, channels - k);
    const V bias = out.bias != nullptr ? load(out.bias + k, n) : V{};
    for (int64_t i = 0; i < count; ++i) {
      const int64_t to = start + i * channels + k;
      V value = load(sums + i * kPanel + half) + bias;
      if (out.residual != nullptr) value = value + load(out.residual + to, n);
      store(out.y + to, out.relu ? relu(value) : value, n);
    }
  }
}

// The windows over `count` pixels of `rows` rows, of which there is one at the end of a map with ceil_mode.
template <class T>
FASTCONV_INLINE void write_windows(
    const FirstPass<T>& pass, int64_t image, int64_t row, int64_t rows, int64_t column, int64_t count, int64_t first,
    const float* sums) {
  const FirstSizes& s = pass.sizes;
  const ConvOutput<T> out = pass.output;
  const int64_t channels = s.out_channels;
  const int64_t start = ((image * out.pooled_height + row / 2) * out.pooled_width + column / 2) * channels;
  for (int64_t half = 0; half < kPanel && first + half < channels; half += kWidth) {
    const int64_t k = first + half, n = least(kWidth, channels - k);
    const V bias = out.bias != nullptr ? load(out.bias + k, n) : V{};
    for (int64_t i = 0; i < count; i += 2) {
      V window[4];
      for (int tap = 0; tap < 4; ++tap) {
        const bool is_inside = tap / 2 < rows && i + tap % 2 < count;
        const float* const sum = sums + (tap / 2 * kColumns + i + tap % 2) * kPanel + half;
        window[tap] = is_inside ? load(sum) + bias : splat(-__builtin_inff());
      }
      VI code;
      const V value = pool_window(window, code);
      const int64_t to = start + i / 2 * channels + k;
      store(out.y + to, value, n);
      store_codes(out.code + to, code, n);
    }
  }
}

// Asks for the lines that `write_pixels` will write: an unpooled output takes longer to get into the cache than to compute.
template <class T>
FASTCONV_INLINE void prefetch_pixels(
    const FirstPass<T>& pass, int64_t image, int64_t row, int64_t column, int64_t count, int64_t first) {
  const FirstSizes& s = pass.sizes;
  const T* const to = pass.output.y + ((image * s.out_height + row) * s.out_width + column) * s.out_channels + first;
  for (int64_t i = 0; i < count; ++i) {
    __builtin_prefetch(to + i * s.out_channels, 1);
    __builtin_prefetch(to + i * s.out_channels + kWidth, 1);
  }
}

template <class T>
void first_forward(const FirstPass<T>& pass, Strip strip, float* memory) {
  const FirstSizes& s = pass.sizes;
  float* const sums = memory;
  FirstElement* const rows = reinterpret_cast<FirstElement*>(memory + 2 * kColumns * kPanel);
  const int64_t of_panel = s.kernel_h * first_steps(s.run()) * kPanel, step = pass.output.code != nullptr ? 2 : 1;
  load_rows(s, pass.x, strip.image, strip.row * s.stride_h - s.pad_h, s.rows_read(strip.rows), rows);
  for (int64_t r = 0; r < strip.rows; r += step) {
    const int64_t row = strip.row + r, count = least(step, strip.rows - r);
    for (int64_t column = 0; column < s.out_width; column += kColumns) {
      const int64_t pixels = least(kColumns, s.out_width - column);
      for (int64_t first = 0; first < s.out_channels; first += kPanel) {
        if (step == 1) prefetch_pixels(pass, strip.image, row, column, pixels, first);
        for (int64_t i = 0; i < count; ++i) {
          const FirstElement* const top = rows + (r + i) * s.stride_h * s.padded();
          const float* const filter = pass.filter + first / kPanel * of_panel;
          sum_pixels(pass, top, row + i, column, pixels, filter, sums + i * kColumns * kPanel);
        }
        if (step == 2) {
          write_windows(pass, strip.image, row, count, column, pixels, first, sums);
        } else {
          write_pixels(pass, strip.image, row, column, pixels, first, sums);
        }
      }
    }
  }
}

FASTCONV_INLINE VI load_codes(const uint8_t* p, int64_t count) {
  VB codes{};
  if (__builtin_expect(count == kWidth, 1)) {
    __builtin_memcpy(&codes, p, sizeof(codes));
  } else {
    for (int64_t i = 0; i < count; ++i) codes[i] = p[i];
  }
  return __builtin_convertvector(codes, VI);
}

// Rows as those of `load_rows`, as left factors of sums over pixels. Pairs are of elements a pixel apart.
template <class T>
FASTCONV_INLINE void load_factors(const FirstSizes& s, const T* x, int64_t image, int64_t first, int64_t count, FirstElement* rows) {
#if FASTCONV_PAIRS
  const int64_t beside = s.pad_w * s.channels, size = s.width * s.channels, pixel = s.stride_w * s.channels;
  const Inside of_map = inside(first, 1, count, s.height);
  for (int64_t i = of_map.begin; i < of_map.end; ++i) {
    const T* const from = x + (image * s.height + first + i) * size;
    float* const pairs = reinterpret_cast<float*>(rows) + i * s.padded();
    const auto each = [&](int64_t begin, int64_t end, const auto& body) FASTCONV_INLINE_LAMBDA {
      for (int64_t j = begin; j < end; j += kWidth) body(j, least(kWidth, end - j));
    };
    each(0, s.padded(), [&](int64_t j, int64_t n) FASTCONV_INLINE_LAMBDA { store(pairs + j, V{}, n); });
    each(0, size, [&](int64_t j, int64_t n) FASTCONV_INLINE_LAMBDA {
      store(pairs + beside + j, (V)((VU)load(from + j, n) >> 16), n);
    });
    each(most(0, pixel - beside), size, [&](int64_t j, int64_t n) FASTCONV_INLINE_LAMBDA {
      float* const to = pairs + beside + j - pixel;
      store(to, (V)((VU)load(to, n) | (VU)load(from + j, n)), n);
    });
  }
#else
  load_rows(s, x, image, first, count, rows);
#endif
}

// The right factors of columns i and i + 1 of a row. Where the row `ends` before i + 1, `next` is zero and, but as the other
// half of a pair, not written.
FASTCONV_INLINE void store_factors(float* row, int64_t i, V here, V next, bool ends) {
#if FASTCONV_PAIRS
  store(row + i / 2 * kPanel, (V)((VU)here >> 16 | (VU)next));
#else
  store(row + i * kPanel, here);
  if (!ends) store(row + (i + 1) * kPanel, next);
#endif
}

// Half a panel, from channel `k` on, of the output's gradient before ReLU and pool in a block of `count` columns, as right
// factors: rows of `pitch` floats. Its sum is added to `bias`. Returns whether all of it is finite.
template <class T>
FASTCONV_INLINE bool open_grad(
    const FirstWeightGrad<T>& pass, Strip strip, int64_t column, int64_t count, int64_t k, float* to, int64_t pitch, float* bias) {
  const FirstSizes& s = pass.sizes;
  const T* const grads = pass.grad;
  const int64_t channels = s.out_channels, n = least(kWidth, channels - k);
  V sum{}, finite{};
  if (pass.code != nullptr) {
    const uint8_t* const codes = pass.code;
    for (int64_t r = 0; r < strip.rows; r += 2) {
      const int64_t row = (strip.image * pass.pooled_height + (strip.row + r) / 2) * pass.pooled_width;
      for (int64_t i = 0; i < count; i += 2) {
        const int64_t from = (row + (column + i) / 2) * channels + k;
        const V grad = load(grads + from, n);
        const VI code = load_codes(codes + from, n);
        for (int h = 0; h < 2 && r + h < strip.rows; ++h) {
          const V here = code == 2 * h + 1 ? grad : V{}, next = code == 2 * h + 2 ? grad : V{};
          store_factors(to + (r + h) * pitch, i, here, next, i + 1 == count);
        }
        const V open = code == 0 ? V{} : grad;
        sum = sum + open;
        finite = fma(open, V{}, finite);
      }
    }
  } else {
    for (int64_t r = 0; r < strip.rows; ++r) {
      const int64_t start = ((strip.image * s.out_height + strip.row + r) * s.out_width + column) * channels + k;
      const auto opened = [&](int64_t i) FASTCONV_INLINE_LAMBDA {
        V open = load(grads + start + i * channels, n);
        if (pass.output != nullptr) open = load(pass.output + start + i * channels, n) <= 0 ? V{} : open;
        sum = sum + open;
        finite = fma(open, V{}, finite);
        return open;
      };
      for (int64_t i = 0; i < count; i += 2) {
        const bool ends = i + 1 == count;
        const V here = opened(i);
        store_factors(to + r * pitch, i, here, ends ? V{} : opened(i + 1), ends);
      }
    }
  }
  store(bias, load(bias) + sum);
  return !any_nan(finite);
}

template <class T>
void first_weight_grad(const FirstWeightGrad<T>& pass, Strip strip, int64_t block, float* sums, float* memory) {
  constexpr int64_t kStep = FirstFactors::kStep;
  const FirstSizes& s = pass.sizes;
  const int64_t row = s.padded() * kStep, run = s.run(), pixel = s.stride_w * s.channels * kStep;
  const int64_t pitch = first_steps(least(block, s.out_width)) * kPanel;
  float* const grads = memory;
  FirstElement* const rows = reinterpret_cast<FirstElement*>(memory + strip.rows * pitch);
  const int64_t top = strip.row * s.stride_h - s.pad_h;
  load_factors(s, pass.x, strip.image, top, s.rows_read(strip.rows), rows);
  for (int64_t column = 0; column < s.out_width; column += block) {
    const int64_t count = least(block, s.out_width - column);
    for (int64_t first = 0; first < s.out_channels; first += kPanel) {
      float* const panel = sums + first * (s.taps() + 1);
      float* const bias = panel + s.taps() * kPanel;
      bool finite = true;
      for (int64_t half = 0; half < kPanel; half += kWidth) {
        if (first + half < s.out_channels) {
          finite &= open_grad(pass, strip, column, count, first + half, grads + half, pitch, bias + half);
        } else {
          for (int64_t i = 0; i < strip.rows * pitch; i += kPanel) store(grads + i + half, V{});
        }
      }
      for (int64_t kh = 0; kh < s.kernel_h; ++kh) {
        const Inside of_map = inside(top + kh, s.stride_h, strip.rows, s.height);
        const FirstElement* const a = rows + (of_map.begin * s.stride_h + kh) * row + column * pixel;
        const float* const b = grads + of_map.begin * pitch;
        float* const c = panel + kh * run * kPanel;
        const Parts parts{of_map.end - of_map.begin, s.stride_h * row, pitch};
        if (__builtin_expect(finite || s.pad_w == 0, 1)) {
          product_in_parts(StridedOf<FirstFactors>{a, kStep, pixel * kStep}, b, kPanel, c, kPanel, run, count, true, parts);
          continue;
        }
        for (int64_t e = 0; e < run; ++e) {
          const Inside across = inside(column * s.stride_w - s.pad_w + e / s.channels, s.stride_w, count, s.width);
          V left = load(c + e * kPanel), right = load(c + e * kPanel + kWidth);
          for (int64_t part = 0; part < parts.count; ++part) {
            for (int64_t i = across.begin; i < across.end; ++i) {
              const V factor = splat(fastconv::load(a[part * parts.a + i * pixel + e * kStep]));
              const float* const grad = b + part * parts.b + i / kStep * kPanel;
              left = fma(factor, FirstFactors::part(load(grad), i), left);
              right = fma(factor, FirstFactors::part(load(grad + kWidth), i), right);
            }
          }
          store(c + e * kPanel, left);
          store(c + e * kPanel + kWidth, right);
        }
      }
    }
  }
}

template <class T>
void first_finish(
    const FirstWeightGrad<T>& pass, int64_t panel, int64_t t0, int64_t t1, const float* sums, int64_t count, int64_t stride) {
  const FirstSizes& s = pass.sizes;
  for (int64_t half = 0; half < kPanel && panel * kPanel + half < s.out_channels; half += kWidth) {
    const int64_t k = panel * kPanel + half, n = least(kWidth, s.out_channels - k);
    for (int64_t t = t0; t < t1; ++t) {
      const float* const from = sums + (panel * (s.taps() + 1) + t) * kPanel + half;
      V total = load(from);
      for (int64_t set = 1; set < count; ++set) total = total + load(from + set * stride);
      if (t == s.taps()) {
        if (pass.bias_grad != nullptr) store(pass.bias_grad + k, total, n);
        continue;
      }
      T lanes[kWidth];
      store(lanes, total);
      for (int64_t i = 0; i < n; ++i) pass.weight_grad[(k + i) * s.taps() + t] = lanes[i];
    }
  }
}

template <class T>
constexpr FirstKernels<T> first_table() {
  return {kPanel, kColumns, FirstFactors::kStep, first_forward<T>, first_weight_grad<T>, first_finish<T>};
}

}  // namespace fastconv::FASTCONV_ISA
