// Max-pooling's backward from codes, with the bias gradient of the map below in the same pass.
#include "channel_sums.h"
#include "operators.h"
#include "windows.h"

namespace fastconv {

namespace {

// Where windows do not overlap: a window writes every pixel of its share of the map.
template <class T, class Code>
FASTCONV_INLINE void unpool_2x2(const T* grad, const Code* code, T* __restrict top, T* __restrict bottom, int64_t channels) {
  FASTCONV_VECTORIZE
  for (int64_t c = 0; c < channels; ++c) {
    const T g = grad[c];
    const Code k = code[c];
    top[c] = keep_if(k == 1, g);
    top[channels + c] = keep_if(k == 2, g);
    bottom[c] = keep_if(k == 3, g);
    bottom[channels + c] = keep_if(k == 4, g);
  }
}

template <class T, class Code>
FASTCONV_INLINE void unpool_share(
    const T* grad, const Code* code, T* image, const Windows& w, int64_t window_row, int64_t window_column) {
  const int64_t channels = w.channels;
  const int64_t left = w.columns.first_pixel(window_column), right = w.columns.last_pixel(window_column);
  for (int64_t r = w.rows.first_pixel(window_row); r < w.rows.last_pixel(window_row); ++r) {
    const int64_t tap_row = w.rows.tap_on(r, window_row);
    for (int64_t c = left; c < right; ++c) {
      T* const pixel = image + (r * w.columns.size + c) * channels;
      const int64_t tap_column = w.columns.tap_on(c, window_column);
      if (tap_row < 0 || tap_column < 0) {
        std::memset(static_cast<void*>(pixel), 0, channels * sizeof(T));
        continue;
      }
      const Code position = static_cast<Code>(1 + tap_row * w.columns.kernel + tap_column);
      FASTCONV_VECTORIZE
      for (int64_t i = 0; i < channels; ++i) pixel[i] = keep_if(code[i] == position, grad[i]);
    }
  }
}

template <bool k2x2, class T, class Code>
FASTCONV_INLINE void unpool_row(const T* grad, const Code* code, T* image, const Windows& w, int64_t window_row) {
  const int64_t channels = w.channels;
  const bool whole_rows = w.rows.last_pixel(window_row) - w.rows.first_pixel(window_row) == 2;
  for (int64_t column = 0; column < w.columns.windows; ++column, grad += channels, code += channels) {
    const int64_t left = w.columns.first_pixel(column);
    if (k2x2 && whole_rows && w.columns.last_pixel(column) - left == 2) {
      T* const top = image + (w.rows.first_pixel(window_row) * w.columns.size + left) * channels;
      unpool_2x2(grad, code, top, top + w.columns.size * channels, channels);
    } else {
      unpool_share(grad, code, image, w, window_row, column);
    }
  }
}

// Where windows overlap: a pixel gathers from the windows that have a tap on it, always in the same order.
template <class T, class Code>
FASTCONV_INLINE void gather_row(const T* grad, const Code* code, T* row, const Windows& w, int64_t pixel_row) {
  float sum[kBlock];
  for (int64_t column = 0; column < w.columns.size; ++column, row += w.channels) {
    for_blocks(w.channels, [&](int64_t first, auto block) FASTCONV_INLINE_LAMBDA {
      const int64_t width = block;
      std::fill_n(sum, width, 0.0f);
      for (int64_t wr = w.rows.first_window(pixel_row); wr < w.rows.last_window(pixel_row); ++wr) {
        const int64_t tap_row = w.rows.tap_on(pixel_row, wr);
        if (tap_row < 0) continue;
        for (int64_t wc = w.columns.first_window(column); wc < w.columns.last_window(column); ++wc) {
          const int64_t tap_column = w.columns.tap_on(column, wc);
          if (tap_column < 0) continue;
          const Code position = static_cast<Code>(1 + tap_row * w.columns.kernel + tap_column);
          const int64_t window = (wr * w.columns.windows + wc) * w.channels + first;
          FASTCONV_VECTORIZE
          for (int64_t c = 0; c < width; ++c) sum[c] += keep_if(code[window + c] == position, load(grad[window + c]));
        }
      }
      FASTCONV_VECTORIZE
      for (int64_t c = 0; c < width; ++c) row[first + c] = round_to<T>(sum[c]);
    });
  }
}

template <class T, class Code>
void gather(const T* grad, const Code* code, T* input_grad, const Windows& w) {
  const int64_t image_size = w.rows.size * w.columns.size * w.channels;
  const int64_t pooled_size = w.rows.windows * w.columns.windows * w.channels;
  const int64_t row_size = w.columns.size * w.channels;
  const int64_t items = w.batch * w.rows.size;
  const Chunks chunks = Chunks::of(items, row_size, items);
  for_chunks(chunks.count, [=](int64_t first, int64_t last) FASTCONV_INLINE_LAMBDA {
    const int64_t end = chunks.end(last - 1);
    for (int64_t item = chunks.begin(first); item < end; ++item) {
      const int64_t image = item / w.rows.size, row = item % w.rows.size;
      gather_row(
          grad + image * pooled_size, code + image * pooled_size, input_grad + image * image_size + row * row_size, w, row);
    }
  });
}

// Rows of windows: un-pooled unless `input_grad` is null, and summed by channel into `bias_grad` unless that is null.
template <bool k2x2, class T, class Code>
void unpool(const T* grad, const Code* code, T* input_grad, T* bias_grad, const Windows& w) {
  const int64_t row_size = w.columns.windows * w.channels;
  const int64_t image_size = w.rows.size * w.columns.size * w.channels;
  const Chunks chunks = Chunks::of(w.batch * w.rows.windows, row_size, ChannelSums::kMostChunks);
  ChannelSums sums(bias_grad == nullptr ? 0 : chunks.count, w.channels);
  for_chunks(chunks.count, [&](int64_t first, int64_t last) FASTCONV_INLINE_LAMBDA {
    for (int64_t chunk = first; chunk < last; ++chunk) {
      for (int64_t item = chunks.begin(chunk); item < chunks.end(chunk); ++item) {
        const T* const g = grad + item * row_size;
        const Code* const k = code + item * row_size;
        if (input_grad != nullptr) {
          T* const image = input_grad + item / w.rows.windows * image_size;
          unpool_row<k2x2>(g, k, image, w, item % w.rows.windows);
        }
        if (bias_grad != nullptr) {
          add_to_channels(sums.of_chunk(chunk), w.columns.windows, w.channels, [=](int64_t i) FASTCONV_INLINE_LAMBDA {
            return keep_if(k[i] != 0, load(g[i]));
          });
        }
      }
    }
  });
  if (bias_grad != nullptr) sums.write_to(bias_grad);
}

template <class T, class Code>
void unpool_by_window(const T* grad, const Code* code, T* input_grad, T* bias_grad, const Windows& w) {
  if (w.rows.overlapping() || w.columns.overlapping()) {
    gather(grad, code, input_grad, w);
    if (bias_grad != nullptr) unpool<false>(grad, code, static_cast<T*>(nullptr), bias_grad, w);
    return;
  }
  const auto plain = [](const Axis& axis) {
    return axis.kernel == 2 && axis.stride == 2 && axis.padding == 0 && axis.dilation == 1;
  };
  if (plain(w.rows) && plain(w.columns)) return unpool<true>(grad, code, input_grad, bias_grad, w);
  return unpool<false>(grad, code, input_grad, bias_grad, w);
}

}  // namespace

void max_pool2d_backward(
    const Tensor& grad, const Tensor& code, const Tensor& input_grad, const std::optional<Tensor>& bias_grad,
    const Pair& kernel, const Pair& stride, const Pair& padding, const Pair& dilation) {
  const Map pooled = map_of(grad, "grad");
  const Map map = map_of(input_grad, "input_grad");
  check_same(code, "code", pooled, code.scalar_type());
  check_same(input_grad, "input_grad", map, grad.scalar_type());
  check_bias(bias_grad, map, grad.scalar_type());
  const Windows windows = Windows::of(map, pooled, kernel, stride, padding, dilation);
  by_dtype(grad.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    by_code(code.scalar_type(), [&](auto code_type) {
      using Code = typename decltype(code_type)::type;
      T* const bias = bias_grad ? write<T>(*bias_grad) : nullptr;
      unpool_by_window(read<T>(grad), read<Code>(code), write<T>(input_grad), bias, windows);
    });
  });
}

}  // namespace fastconv
