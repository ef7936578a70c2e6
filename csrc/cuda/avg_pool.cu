// Average pooling of any window and of whole maps, and their gradients.
#include "../passes.h"
#include "pixels.h"
#include "values.h"
#include "windows.h"

namespace fastconv {

template <class T>
struct AvgPoolParams {
  const T* from;
  T* to;
  Windows windows;
  Runs runs;  // over pixels of `to`
  float divisor;  // 0: the pixels of the window
  bool count_include_pad;
};

// By what a window's sum is divided: its pixels, with or without those of the padding, which does not reach beyond it.
FASTCONV_DEVICE int pixels_along(const WindowAxis& axis, int window, bool count_include_pad) {
  int first = window * axis.stride - axis.padding, last = first + axis.kernel;
  const int end = axis.size + axis.padding;
  last = last < end ? last : end;
  if (!count_include_pad) {
    first = first > 0 ? first : 0;
    last = last < axis.size ? last : axis.size;
  }
  return last - first;
}

template <class T>
FASTCONV_DEVICE float divisor_of(const AvgPoolParams<T>& p, int row, int column) {
  if (p.divisor != 0.0f) return p.divisor;
  const int height = pixels_along(p.windows.rows, row, p.count_include_pad);
  return static_cast<float>(height * pixels_along(p.windows.columns, column, p.count_include_pad));
}

template <class T, int V>
__global__ void __launch_bounds__(kPassThreads, 2) avg_pool_kernel(const AvgPoolParams<T> p) {
  const int channel = channel_of<V>(p.runs);
  const WindowAxis &rows = p.windows.rows, &columns = p.windows.columns;
  over_pixels<1, V>(p.runs, nullptr, [&](int pixel, float (&)[1][V]) {
    const Position at = Position::of(pixel, rows.windows, columns.windows);
    float sum[V];
    for (int i = 0; i < V; ++i) sum[i] = 0.0f;
    bool is_empty = true;  // of ceil_mode's windows, one may lie beyond the map
    for (int tap = 0; tap < rows.kernel * columns.kernel; ++tap) {
      const int row = rows.pixel(at.row, tap / columns.kernel), column = columns.pixel(at.column, tap % columns.kernel);
      if (!is_inside(row, rows.size) || !is_inside(column, columns.size)) continue;
      float x[V];
      load_values<T, V>(x, p.from + pixel_of(at.n, row, column, rows.size, columns.size) * p.runs.channels + channel);
      FASTCONV_UNROLL
      for (int i = 0; i < V; ++i) sum[i] += x[i];
      is_empty = false;
    }
    const float divisor = is_empty ? 1.0f : divisor_of(p, at.row, at.column);
    FASTCONV_UNROLL
    for (int i = 0; i < V; ++i) sum[i] /= divisor;
    store_values<T, V>(p.to + static_cast<int64_t>(pixel) * p.runs.channels + channel, sum);
  });
}

template <class T, int V>
__global__ void __launch_bounds__(kPassThreads, 2) avg_pool_backward_kernel(const AvgPoolParams<T> p) {
  const int channel = channel_of<V>(p.runs);
  const WindowAxis &rows = p.windows.rows, &columns = p.windows.columns;
  over_pixels<1, V>(p.runs, nullptr, [&](int pixel, float (&)[1][V]) {
    const Position at = Position::of(pixel, rows.size, columns.size);
    float sum[V];
    for (int i = 0; i < V; ++i) sum[i] = 0.0f;
    for (int row = rows.first_window(at.row); row <= rows.last_window(at.row); ++row) {
      for (int column = columns.first_window(at.column); column <= columns.last_window(at.column); ++column) {
        float grad[V];
        load_values<T, V>(grad, p.from + pixel_of(at.n, row, column, rows.windows, columns.windows) * p.runs.channels + channel);
        const float divisor = divisor_of(p, row, column);
        FASTCONV_UNROLL
        for (int i = 0; i < V; ++i) sum[i] += grad[i] / divisor;
      }
    }
    store_values<T, V>(p.to + static_cast<int64_t>(pixel) * p.runs.channels + channel, sum);
  });
}

template <class T>
struct GlobalPoolParams {
  const T* from;
  T* to;
  float* rows;
  Runs runs;  // over pixels of the map; forward by images
  int size;   // pixels of an image
};

template <class T, int V>
__global__ void __launch_bounds__(kPassThreads, 2) global_avg_pool_kernel(const GlobalPoolParams<T> p) {
  const int channel = channel_of<V>(p.runs);
  over_pixels<1, V>(p.runs, p.rows, [&](int pixel, float (&sums)[1][V]) {
    float x[V];
    load_values<T, V>(x, p.from + static_cast<int64_t>(pixel) * p.runs.channels + channel);
    FASTCONV_UNROLL
    for (int i = 0; i < V; ++i) sums[0][i] += x[i];
  });
}

template <class T, int V>
__global__ void __launch_bounds__(kPassThreads, 2) global_avg_pool_backward_kernel(const GlobalPoolParams<T> p) {
  const int channel = channel_of<V>(p.runs);
  over_pixels<1, V>(p.runs, nullptr, [&](int pixel, float (&)[1][V]) {
    float grad[V];
    load_values<T, V>(grad, p.from + static_cast<int64_t>(pixel / p.size) * p.runs.channels + channel);
    FASTCONV_UNROLL
    for (int i = 0; i < V; ++i) grad[i] /= static_cast<float>(p.size);
    store_values<T, V>(p.to + static_cast<int64_t>(pixel) * p.runs.channels + channel, grad);
  });
}

namespace {

// `map` and `pooled`: of the pooling; from → to is its forward, or its backward.
void pool(
    const Tensor& from, const Tensor& to, const Map& map, const Map& pooled, const Pair& kernel, const Pair& stride,
    const Pair& padding, bool count_include_pad, std::optional<int64_t> divisor, bool is_backward) {
  STD_TORCH_CHECK(to.scalar_type() == from.scalar_type(), "fastconv_native: an average pooling keeps the dtype");
  const Windows windows = Windows::of(map, pooled, kernel, stride, padding, {1, 1});
  const Call call(from);
  by_dtype(from.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::T;
    const float fixed = static_cast<float>(divisor.value_or(0));
    AvgPoolParams<T> p{call.read<T>(from), call.write<T>(to), windows, {}, fixed, count_include_pad};
    by_vector<T>(map.channels, {p.from, p.to}, [&](auto vector) {
      constexpr int V = decltype(vector)::value;
      p.runs = Runs::of(is_backward ? map.pixels() : pooled.pixels(), map.channels, V);
      const auto kernel = is_backward ? avg_pool_backward_kernel<T, V> : avg_pool_kernel<T, V>;
      launch(call.stream(), kernel, p.runs.blocks(), kPassThreads, 0, p);
    });
  });
}

}  // namespace

void avg_pool2d(
    const Tensor& x, const Tensor& output, const Pair& kernel, const Pair& stride, const Pair& padding,
    bool count_include_pad, std::optional<int64_t> divisor) {
  const Map map = map_of(x, "x"), pooled = map_of(output, "output");
  pool(x, output, map, pooled, kernel, stride, padding, count_include_pad, divisor, false);
}

void avg_pool2d_backward(
    const Tensor& grad, const Tensor& input_grad, const Pair& kernel, const Pair& stride, const Pair& padding,
    bool count_include_pad, std::optional<int64_t> divisor) {
  const Map map = map_of(input_grad, "input_grad"), pooled = map_of(grad, "grad");
  pool(grad, input_grad, map, pooled, kernel, stride, padding, count_include_pad, divisor, true);
}

void global_avg_pool2d(const Tensor& x, const Tensor& output) {
  const Map map = map_of(x, "x");
  check_same(output, "output", {map.batch, map.channels, 1, 1}, x.scalar_type());
  const Call call(x);
  by_dtype(x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::T;
    const int64_t size = map.height * map.width;
    GlobalPoolParams<T> p{call.read<T>(x), nullptr, nullptr, {}, static_cast<int>(size)};
    by_vector<T>(map.channels, {p.from}, [&](auto vector) {
      constexpr int V = decltype(vector)::value;
      p.runs = Runs::of(size, map.channels, V, map.batch);
      const Tensor rows = scratch(x, {p.runs.rows(), map.channels});
      p.rows = call.write<float>(rows);
      launch(call.stream(), global_avg_pool_kernel<T, V>, p.runs.blocks(), kPassThreads, kSumBytes<1, V>, p);
      const float share = 1.0f / static_cast<float>(size);
      sum_rows(call.stream(), p.rows, p.runs.runs, call.write<T>(output), map.channels, map.batch, share);
    });
  });
}

void global_avg_pool2d_backward(const Tensor& grad, const Tensor& input_grad) {
  const Map map = map_of(input_grad, "input_grad");
  check_same(grad, "grad", {map.batch, map.channels, 1, 1}, input_grad.scalar_type());
  const Call call(grad);
  by_dtype(grad.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::T;
    const int size = static_cast<int>(map.height * map.width);
    GlobalPoolParams<T> p{call.read<T>(grad), call.write<T>(input_grad), nullptr, {}, size};
    by_vector<T>(map.channels, {p.from, p.to}, [&](auto vector) {
      constexpr int V = decltype(vector)::value;
      p.runs = Runs::of(map.pixels(), map.channels, V);
      launch(call.stream(), global_avg_pool_backward_kernel<T, V>, p.runs.blocks(), kPassThreads, 0, p);
    });
  });
}

}  // namespace fastconv
