// Average pooling of NHWC maps: sums in float32, then one division, as torch does.
#include "channel_sums.h"
#include "operators.h"
#include "windows.h"

namespace fastconv {

namespace {

// What a window's sum is divided by: torch counts padding only up to the padded border, not what ceil_mode adds.
struct Divisor {
  bool count_include_pad;
  int64_t override;  // 0: none

  FASTCONV_INLINE static int64_t padded(const Axis& axis, int64_t window) {
    const int64_t start = window * axis.stride - axis.padding;
    return std::min(start + axis.kernel, axis.size + axis.padding) - start;
  }

  FASTCONV_INLINE float of(const Windows& w, int64_t row, int64_t column) const {
    if (override != 0) return static_cast<float>(override);
    if (count_include_pad) return static_cast<float>(padded(w.rows, row) * padded(w.columns, column));
    const Taps rows = w.rows.taps(row), columns = w.columns.taps(column);
    return static_cast<float>((rows.end - rows.begin) * (columns.end - columns.begin));
  }
};

template <class T>
FASTCONV_INLINE void average_row(const T* image, T* output, const Windows& w, const Divisor& divisor, int64_t window_row) {
  float sum[kBlock];
  const Taps rows = w.rows.taps(window_row);
  for (int64_t column = 0; column < w.columns.windows; ++column, output += w.channels) {
    const Taps columns = w.columns.taps(column);
    if (rows.begin == rows.end || columns.begin == columns.end) {  // ceil_mode's, beyond the map
      std::memset(static_cast<void*>(output), 0, w.channels * sizeof(T));
      continue;
    }
    const float count = divisor.of(w, window_row, column);
    for_blocks(w.channels, [&](int64_t first, auto block) FASTCONV_INLINE_LAMBDA {
      const int64_t width = block;
      std::fill_n(sum, width, 0.0f);
      for (int64_t r = rows.begin; r < rows.end; ++r) {
        const T* pixel = image + ((rows.start + r) * w.columns.size + columns.start + columns.begin) * w.channels + first;
        for (int64_t t = columns.begin; t < columns.end; ++t, pixel += w.channels) {
          FASTCONV_VECTORIZE
          for (int64_t c = 0; c < width; ++c) sum[c] += load(pixel[c]);
        }
      }
      FASTCONV_VECTORIZE
      for (int64_t c = 0; c < width; ++c) output[first + c] = round_to<T>(sum[c] / count);
    });
  }
}

template <class T>
FASTCONV_INLINE void spread_row(const T* grad, T* row, const Windows& w, const Divisor& divisor, int64_t pixel_row) {
  float sum[kBlock];
  const int64_t top = w.rows.first_window(pixel_row), bottom = w.rows.last_window(pixel_row);
  for (int64_t column = 0; column < w.columns.size; ++column, row += w.channels) {
    const int64_t left = w.columns.first_window(column), right = w.columns.last_window(column);
    for_blocks(w.channels, [&](int64_t first, auto block) FASTCONV_INLINE_LAMBDA {
      const int64_t width = block;
      std::fill_n(sum, width, 0.0f);
      for (int64_t wr = top; wr < bottom; ++wr) {
        for (int64_t wc = left; wc < right; ++wc) {
          const float count = divisor.of(w, wr, wc);
          const T* const window = grad + (wr * w.columns.windows + wc) * w.channels + first;
          FASTCONV_VECTORIZE
          for (int64_t c = 0; c < width; ++c) sum[c] += load(window[c]) / count;
        }
      }
      FASTCONV_VECTORIZE
      for (int64_t c = 0; c < width; ++c) row[first + c] = round_to<T>(sum[c]);
    });
  }
}

// row(image, row) for every row of every image.
template <class Row>
void for_rows(int64_t batch, int64_t rows, int64_t cost, const Row& row) {
  const Chunks chunks = Chunks::of(batch * rows, cost, batch * rows);
  for_chunks(chunks.count, [&](int64_t first, int64_t last) FASTCONV_INLINE_LAMBDA {
    const int64_t end = chunks.end(last - 1);
    for (int64_t item = chunks.begin(first); item < end; ++item) row(item / rows, item % rows);
  });
}

Windows dense_windows(const Map& map, const Map& pooled, const Pair& kernel, const Pair& stride, const Pair& padding) {
  return Windows::of(map, pooled, kernel, stride, padding, {1, 1});
}

}  // namespace

void avg_pool2d(
    const Tensor& x, const Tensor& output, const Pair& kernel, const Pair& stride, const Pair& padding,
    bool count_include_pad, std::optional<int64_t> divisor_override) {
  const Map map = map_of(x, "x"), pooled = map_of(output, "output");
  check_same(output, "output", pooled, x.scalar_type());
  const Windows w = dense_windows(map, pooled, kernel, stride, padding);
  const Divisor divisor{count_include_pad, divisor_override.value_or(0)};
  by_dtype(x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const T* const in = read<T>(x);
    T* const out = write<T>(output);
    const int64_t image_size = map.height * map.width * map.channels;
    const int64_t row_size = pooled.width * pooled.channels;
    const int64_t cost = row_size * kernel[0] * kernel[1];
    for_rows(map.batch, pooled.height, cost, [&](int64_t image, int64_t row) FASTCONV_INLINE_LAMBDA {
      average_row(in + image * image_size, out + (image * pooled.height + row) * row_size, w, divisor, row);
    });
  });
}

void avg_pool2d_backward(
    const Tensor& grad, const Tensor& input_grad, const Pair& kernel, const Pair& stride, const Pair& padding,
    bool count_include_pad, std::optional<int64_t> divisor_override) {
  const Map pooled = map_of(grad, "grad"), map = map_of(input_grad, "input_grad");
  check_same(input_grad, "input_grad", map, grad.scalar_type());
  const Windows w = dense_windows(map, pooled, kernel, stride, padding);
  const Divisor divisor{count_include_pad, divisor_override.value_or(0)};
  by_dtype(grad.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const T* const in = read<T>(grad);
    T* const out = write<T>(input_grad);
    const int64_t pooled_size = pooled.height * pooled.width * pooled.channels;
    const int64_t row_size = map.width * map.channels;
    for_rows(map.batch, map.height, row_size, [&](int64_t image, int64_t row) FASTCONV_INLINE_LAMBDA {
      spread_row(in + image * pooled_size, out + (image * map.height + row) * row_size, w, divisor, row);
    });
  });
}

void global_avg_pool2d(const Tensor& x, const Tensor& output) {
  const Map map = map_of(x, "x");
  check_same(output, "output", {map.batch, map.channels, 1, 1}, x.scalar_type());
  by_dtype(x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const T* const in = read<T>(x);
    T* const out = write<T>(output);
    const int64_t row_size = map.width * map.channels;
    const float area = static_cast<float>(map.height * map.width);
    ChannelSums sums(map.batch, map.channels);
    for_rows(map.batch, 1, map.height * row_size, [&](int64_t image, int64_t) FASTCONV_INLINE_LAMBDA {
      float* const sum = sums.of_chunk(image);
      for (int64_t row = 0; row < map.height; ++row) {
        const T* const pixels = in + (image * map.height + row) * row_size;
        add_to_channels(sum, map.width, map.channels, [=](int64_t i) FASTCONV_INLINE_LAMBDA { return load(pixels[i]); });
      }
      T* const mean = out + image * map.channels;
      FASTCONV_VECTORIZE
      for (int64_t c = 0; c < map.channels; ++c) mean[c] = round_to<T>(sum[c] / area);
    });
  });
}

void global_avg_pool2d_backward(const Tensor& grad, const Tensor& input_grad) {
  const Map map = map_of(input_grad, "input_grad");
  check_same(grad, "grad", {map.batch, map.channels, 1, 1}, input_grad.scalar_type());
  by_dtype(grad.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const T* const in = read<T>(grad);
    T* const out = write<T>(input_grad);
    const int64_t channels = map.channels;
    const float area = static_cast<float>(map.height * map.width);
    for_rows(map.batch, map.height, map.width * channels, [&](int64_t image, int64_t row) FASTCONV_INLINE_LAMBDA {
      const T* const mean = in + image * channels;
      T* const first = out + (image * map.height + row) * map.width * channels;
      FASTCONV_VECTORIZE
      for (int64_t c = 0; c < channels; ++c) first[c] = round_to<T>(load(mean[c]) / area);
      for (int64_t pixel = 1; pixel < map.width; ++pixel) {
        std::memcpy(static_cast<void*>(first + pixel * channels), first, channels * sizeof(T));
      }
    });
  });
}

}  // namespace fastconv
