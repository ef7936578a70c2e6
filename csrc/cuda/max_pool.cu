// Max-pooling of any window, NaN-exact, and its gradient as a gather by the winners' codes.
#include "../passes.h"
#include "pixels.h"
#include "values.h"
#include "windows.h"

namespace fastconv {

template <class T, class Code>
struct MaxPoolParams {
  const T* x;
  T* y;
  Code* code;
  Windows windows;
  Runs runs;  // over pixels of y
  bool relu;
};

// y = max_pool2d(relu(x) if relu else x); code = 1 + tap of the winner, 0 where ReLU closed.
template <class T, class Code, int V>
__global__ void __launch_bounds__(kPassThreads, 2) max_pool_kernel(const MaxPoolParams<T, Code> p) {
  const int channel = channel_of<V>(p.runs);
  const WindowAxis &rows = p.windows.rows, &columns = p.windows.columns;
  over_pixels<1, V>(p.runs, nullptr, [&](int pixel, float (&)[1][V]) {
    const Position at = Position::of(pixel, rows.windows, columns.windows);
    float best[V];
    int code[V];
    bool is_first = true;
    for (int i = 0; i < V; ++i) {
      best[i] = -INFINITY;
      code[i] = 0;
    }
    for (int tap = 0; tap < rows.kernel * columns.kernel; ++tap) {
      const int row = rows.pixel(at.row, tap / columns.kernel), column = columns.pixel(at.column, tap % columns.kernel);
      if (!is_inside(row, rows.size) || !is_inside(column, columns.size)) continue;
      float x[V];
      load_values<T, V>(x, p.x + pixel_of(at.n, row, column, rows.size, columns.size) * p.runs.channels + channel);
      FASTCONV_UNROLL
      for (int i = 0; i < V; ++i) {
        const bool wins = is_first || is_update(x[i], best[i]);  // of nothing but −∞, the first
        best[i] = wins ? x[i] : best[i];
        code[i] = wins ? 1 + tap : code[i];
      }
      is_first = false;
    }
    if (p.relu) {
      FASTCONV_UNROLL
      for (int i = 0; i < V; ++i) {
        code[i] = best[i] <= 0.0f ? 0 : code[i];
        best[i] = relu(best[i]);
      }
    }
    const int64_t offset = static_cast<int64_t>(pixel) * p.runs.channels + channel;
    store_values<T, V>(p.y + offset, best);
    store_codes<Code, V>(p.code + offset, code);
  });
}

template <class T, class Code>
struct UnpoolParams {
  const T* grad;
  const Code* code;
  T* input_grad;
  float* rows;  // null: no sums are wanted
  Windows windows;
  Runs runs;  // over pixels of input_grad; of unpool_2x2_kernel, over windows, with those that the pool left out
};

// Every pixel adds up, in order, the gradients of the windows that it won.
template <class T, class Code, int V>
__global__ void __launch_bounds__(kPassThreads, 2) unpool_kernel(const UnpoolParams<T, Code> p) {
  const int channel = channel_of<V>(p.runs);
  const WindowAxis &rows = p.windows.rows, &columns = p.windows.columns;
  over_pixels<1, V>(p.runs, p.rows, [&](int pixel, float (&sums)[1][V]) {
    const Position at = Position::of(pixel, rows.size, columns.size);
    float won[V];
    for (int i = 0; i < V; ++i) won[i] = 0.0f;
    for (int row = rows.first_window(at.row); row <= rows.last_window(at.row); ++row) {
      const int tap_row = rows.tap_on(at.row, row);
      if (tap_row < 0) continue;
      for (int column = columns.first_window(at.column); column <= columns.last_window(at.column); ++column) {
        const int tap_column = columns.tap_on(at.column, column);
        if (tap_column < 0) continue;
        const int64_t offset = pixel_of(at.n, row, column, rows.windows, columns.windows) * p.runs.channels + channel;
        float grad[V];
        int code[V];
        load_values<T, V>(grad, p.grad + offset);
        load_codes<Code, V>(code, p.code + offset);
        FASTCONV_UNROLL
        for (int i = 0; i < V; ++i) won[i] += code[i] == 1 + tap_row * columns.kernel + tap_column ? grad[i] : 0.0f;
      }
    }
    FASTCONV_UNROLL
    for (int i = 0; i < V; ++i) sums[0][i] += won[i];
    store_values<T, V>(p.input_grad + static_cast<int64_t>(pixel) * p.runs.channels + channel, won);
  });
}

// 2×2 with stride 2: gradient and code of a window are read once, and its four pixels written.
template <class T, class Code, int V>
__global__ void __launch_bounds__(kPassThreads, 2) unpool_2x2_kernel(const UnpoolParams<T, Code> p) {
  const int channel = channel_of<V>(p.runs);
  const WindowAxis &rows = p.windows.rows, &columns = p.windows.columns;
  over_pixels<1, V>(p.runs, p.rows, [&](int window, float (&sums)[1][V]) {
    const Position at = Position::of(window, (rows.size + 1) / 2, (columns.size + 1) / 2);
    float grad[V];
    int code[V];
    if (at.row < rows.windows && at.column < columns.windows) {
      const int64_t offset = pixel_of(at.n, at.row, at.column, rows.windows, columns.windows) * p.runs.channels + channel;
      load_values<T, V>(grad, p.grad + offset);
      load_codes<Code, V>(code, p.code + offset);
    } else {
      for (int i = 0; i < V; ++i) {
        grad[i] = 0.0f;
        code[i] = 0;
      }
    }
    FASTCONV_UNROLL
    for (int i = 0; i < V; ++i) sums[0][i] += code[i] == 0 ? 0.0f : grad[i];
    FASTCONV_UNROLL
    for (int member = 0; member < 4; ++member) {
      const int row = 2 * at.row + member / 2, column = 2 * at.column + member % 2;
      if (row >= rows.size || column >= columns.size) continue;
      float won[V];
      FASTCONV_UNROLL
      for (int i = 0; i < V; ++i) won[i] = code[i] == 1 + member ? grad[i] : 0.0f;
      store_values<T, V>(p.input_grad + pixel_of(at.n, row, column, rows.size, columns.size) * p.runs.channels + channel, won);
    }
  });
}

namespace {

// body(Type<Code>) for the integer that holds a winner's code.
template <class Body>
void by_code(const Tensor& code, const Map& pooled, const Body& body) {
  const ScalarType dtype = code.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Byte || dtype == ScalarType::Int, "fastconv_native: codes must be uint8 or int32");
  check_same(code, "code", pooled, dtype);
  if (dtype == ScalarType::Byte) return body(Type<uint8_t>{});
  body(Type<int32_t>{});
}

}  // namespace

void max_pool2d(
    const Tensor& x, const Tensor& output, const Tensor& code, const Pair& kernel, const Pair& stride, const Pair& padding,
    const Pair& dilation, bool relu) {
  const Map map = map_of(x, "x"), pooled = map_of(output, "output");
  check_same(output, "output", pooled, x.scalar_type());
  const Windows windows = Windows::of(map, pooled, kernel, stride, padding, dilation);
  const Call call(x);
  by_code(code, pooled, [&](auto code_type) {
    using Code = typename decltype(code_type)::T;
    by_dtype(x.scalar_type(), [&](auto type) {
      using T = typename decltype(type)::T;
      MaxPoolParams<T, Code> p{call.read<T>(x), call.write<T>(output), call.write<Code>(code), windows, {}, relu};
      by_vector<T>(map.channels, {p.x, p.y, p.code}, [&](auto vector) {
        constexpr int V = decltype(vector)::value;
        p.runs = Runs::of(pooled.pixels(), map.channels, V);
        launch(call.stream(), max_pool_kernel<T, Code, V>, p.runs.blocks(), kPassThreads, 0, p);
      });
    });
  });
}

void max_pool2d_backward(
    const Tensor& grad, const Tensor& code, const Tensor& input_grad, const std::optional<Tensor>& bias_grad,
    const Pair& kernel, const Pair& stride, const Pair& padding, const Pair& dilation) {
  const Map map = map_of(input_grad, "input_grad"), pooled = map_of(grad, "grad");
  check_same(input_grad, "input_grad", map, grad.scalar_type());
  check_bias(bias_grad, map, grad.scalar_type());
  const Windows windows = Windows::of(map, pooled, kernel, stride, padding, dilation);
  const Pair one{1, 1}, two{2, 2}, none{0, 0};
  const bool is_2x2 = kernel == two && stride == two && padding == none && dilation == one;
  const Call call(grad);
  by_code(code, pooled, [&](auto code_type) {
    using Code = typename decltype(code_type)::T;
    by_dtype(grad.scalar_type(), [&](auto type) {
      using T = typename decltype(type)::T;
      UnpoolParams<T, Code> p{call.read<T>(grad), call.read<Code>(code), call.write<T>(input_grad), nullptr, windows, {}};
      by_vector<T>(map.channels, {p.grad, p.code, p.input_grad}, [&](auto vector) {
        constexpr int V = decltype(vector)::value;
        const int64_t steps = is_2x2 ? map.batch * ceil_div(map.height, 2) * ceil_div(map.width, 2) : map.pixels();
        p.runs = Runs::of(steps, map.channels, V);
        const Tensor rows = scratch(grad, {bias_grad ? p.runs.rows() : 0, map.channels});
        p.rows = bias_grad ? call.write<float>(rows) : nullptr;
        const auto kernel = is_2x2 ? unpool_2x2_kernel<T, Code, V> : unpool_kernel<T, Code, V>;
        launch(call.stream(), kernel, p.runs.blocks(), kPassThreads, kSumBytes<1, V>, p);
        if (bias_grad) sum_rows(call.stream(), p.rows, p.runs.rows(), call.write<T>(*bias_grad), map.channels);
      });
    });
  });
}

}  // namespace fastconv
