// Batch normalisation's backward behind a ReLU: two sums a channel in one pass, the input's gradient in another.
//
// The closed gradient is where(gate <= 0, 0, grad), `gate` the output; behind a 2×2 max-pool a window's gradient belongs to the
// pixel that its code names.
#include "../passes.h"
#include "batch_norm.h"

namespace fastconv {

template <class T>
struct BackwardParams {
  const T* grad;
  const T* gate;        // null: the gradient is closed already
  const uint8_t* code;  // in place of a gate, behind a pool
  const T* x;           // of the input's gradient, null: the statistics are constants
  const float* sums;    // [2, channels]
  T* input_grad;
  T* closed;
  float* rows;
  Terms terms;
  Runs runs;  // over pixels; behind a pool over windows, with those that an odd map leaves out
  int height, width, out_height, out_width;
  float inverse_count;
};

template <class T, int V>
FASTCONV_DEVICE void load_closed(float (&grad)[V], const BackwardParams<T>& p, int64_t offset) {
  load_values<T, V>(grad, p.grad + offset);
  if (p.gate == nullptr) return;
  float gate[V];
  load_values<T, V>(gate, p.gate + offset);
  FASTCONV_UNROLL
  for (int i = 0; i < V; ++i) grad[i] = gate[i] <= 0.0f ? 0.0f : grad[i];
}

// A window's gradient and code; behind the last window of an odd map there is none.
template <class T, int V>
struct Window {
  Position at;
  float grad[V];
  int code[V];

  FASTCONV_DEVICE Window(const BackwardParams<T>& p, int index, int channel)
      : at(Position::of(index, (p.height + 1) / 2, (p.width + 1) / 2)) {
    if (at.row < p.out_height && at.column < p.out_width) {
      const int64_t offset = pixel_of(at.n, at.row, at.column, p.out_height, p.out_width) * p.runs.channels + channel;
      load_values<T, V>(grad, p.grad + offset);
      load_codes<uint8_t, V>(code, p.code + offset);
    } else {
      for (int i = 0; i < V; ++i) {
        grad[i] = 0.0f;
        code[i] = 0;
      }
    }
  }

  // body(gradient, offset) for the window's pixels that lie in the map.
  template <class Body>
  FASTCONV_DEVICE void over_members(const BackwardParams<T>& p, int channel, const Body& body) const {
    FASTCONV_UNROLL
    for (int member = 0; member < 4; ++member) {
      const int row = 2 * at.row + member / 2, column = 2 * at.column + member % 2;
      if (row >= p.height || column >= p.width) continue;
      float won[V];
      FASTCONV_UNROLL
      for (int i = 0; i < V; ++i) won[i] = code[i] == 1 + member ? grad[i] : 0.0f;
      body(won, pixel_of(at.n, row, column, p.height, p.width) * p.runs.channels + channel);
    }
  }
};

// Σ g and Σ g · (x − mean), of the closed gradient g. A NaN of x counts where g is 0 too, as in torch.
template <class T, int V, bool kPool>
__global__ void __launch_bounds__(kPassThreads, 2) backward_sums_kernel(const BackwardParams<T> p) {
  const int channel = channel_of<V>(p.runs);
  float mean[V];
  FASTCONV_UNROLL
  for (int i = 0; i < V; ++i) mean[i] = channel + i < p.runs.channels ? p.terms.mean.template at<T>(channel + i, 0.0f) : 0.0f;
  over_pixels<2, V>(p.runs, p.rows, [&](int pixel, float (&sums)[2][V]) {
    const auto add = [&](const float (&grad)[V], int64_t offset) {
      float x[V];
      load_values<T, V>(x, p.x + offset);
      FASTCONV_UNROLL
      for (int i = 0; i < V; ++i) {
        sums[0][i] += grad[i];
        sums[1][i] += grad[i] * (x[i] - mean[i]);
      }
    };
    if constexpr (kPool) {
      Window<T, V>(p, pixel, channel).over_members(p, channel, add);
    } else {
      const int64_t offset = static_cast<int64_t>(pixel) * p.runs.channels + channel;
      float grad[V];
      load_closed<T, V>(grad, p, offset);
      add(grad, offset);
    }
  });
}

struct ScaleParams {
  float* sums;
  Terms terms;
  int channels;
};

// The second sums become those of g · (x − mean) / √(var + eps).
template <class T>
__global__ void __launch_bounds__(kSumThreads) scale_sums_kernel(const ScaleParams p) {
  const int channel = blockIdx.x * kSumThreads + threadIdx.x;
  if (channel >= p.channels) return;
  float* const sum = p.sums + p.channels + channel;
  store(sum, load_own<float>(sum) * p.terms.inverse_at<T>(channel));
}

// scale · (g − mean of g − (x − mean) · slope); with constant statistics scale · g.
template <int V>
struct InputGrad {
  float mean[V], scale[V], grad_mean[V], slope[V];

  template <class T>
  FASTCONV_DEVICE InputGrad(const BackwardParams<T>& p, int channel) {
    FASTCONV_UNROLL
    for (int i = 0; i < V; ++i) {
      const bool is_there = channel + i < p.runs.channels, varies = is_there && p.x != nullptr;
      const float inverse = is_there ? p.terms.template inverse_at<T>(channel + i) : 0.0f;
      scale[i] = is_there ? inverse * p.terms.weight.template at<T>(channel + i, 1.0f) : 0.0f;
      mean[i] = varies ? p.terms.mean.template at<T>(channel + i, 0.0f) : 0.0f;
      grad_mean[i] = varies ? load<float>(p.sums + channel + i) * p.inverse_count : 0.0f;
      slope[i] = varies ? load<float>(p.sums + p.runs.channels + channel + i) * p.inverse_count * inverse : 0.0f;
    }
  }

  template <class T>
  FASTCONV_DEVICE void write(const BackwardParams<T>& p, const float (&grad)[V], int64_t offset) const {
    float result[V];
    if (p.x != nullptr) {
      float x[V];
      load_values<T, V>(x, p.x + offset);
      FASTCONV_UNROLL
      for (int i = 0; i < V; ++i) result[i] = (grad[i] - grad_mean[i] - (x[i] - mean[i]) * slope[i]) * scale[i];
    } else {
      FASTCONV_UNROLL
      for (int i = 0; i < V; ++i) result[i] = grad[i] * scale[i];
    }
    store_values<T, V>(p.input_grad + offset, result);
  }
};

template <class T, int V>
__global__ void __launch_bounds__(kPassThreads, 2) input_grad_kernel(const BackwardParams<T> p) {
  const int channel = channel_of<V>(p.runs);
  const InputGrad<V> input_grad(p, channel);
  over_pixels<1, V>(p.runs, nullptr, [&](int pixel, float (&)[1][V]) {
    const int64_t offset = static_cast<int64_t>(pixel) * p.runs.channels + channel;
    float grad[V];
    load_closed<T, V>(grad, p, offset);
    if (p.closed != nullptr) store_values<T, V>(p.closed + offset, grad);
    if (p.input_grad != nullptr) input_grad.write(p, grad, offset);
  });
}

// Over windows: the row and column that an odd map leaves out of its pooling have a gradient through the statistics.
template <class T, int V>
__global__ void __launch_bounds__(kPassThreads, 2) pool_input_grad_kernel(const BackwardParams<T> p) {
  const int channel = channel_of<V>(p.runs);
  const InputGrad<V> input_grad(p, channel);
  over_pixels<1, V>(p.runs, nullptr, [&](int window, float (&)[1][V]) {
    const auto write = [&](const float (&grad)[V], int64_t offset) { input_grad.write(p, grad, offset); };
    Window<T, V>(p, window, channel).over_members(p, channel, write);
  });
}

namespace {

// The two passes. `map` is x's, `pooled` of the gradient and the code, where there is one.
template <class T, bool kPool>
void backward(
    const Call& call, BackwardParams<T> p, const Tensor& grad, const std::optional<Tensor>& x,
    const std::optional<Tensor>& sums, bool training, const Map& map, const Map& pooled) {
  p.x = call.read<T>(x);
  p.height = static_cast<int>(map.height);
  p.width = static_cast<int>(map.width);
  p.out_height = static_cast<int>(pooled.height);
  p.out_width = static_cast<int>(pooled.width);
  p.inverse_count = 1.0f / static_cast<float>(map.pixels());
  by_vector<T>(map.channels, {p.grad, p.gate, p.code, p.x, p.input_grad, p.closed}, [&](auto vector) {
    constexpr int V = decltype(vector)::value;
    const int64_t windows = map.batch * ceil_div(map.height, 2) * ceil_div(map.width, 2);
    p.runs = Runs::of(kPool ? windows : map.pixels(), map.channels, V);
    if (x) {
      float* const output = call.write<float>(*sums);
      const Tensor rows = scratch(grad, {2 * p.runs.rows(), map.channels});
      p.rows = call.write<float>(rows);
      launch(call.stream(), backward_sums_kernel<T, V, kPool>, p.runs.blocks(), kPassThreads, kSumBytes<2, V>, p);
      sum_rows(call.stream(), p.rows, p.runs.rows(), output, 2 * map.channels);
      const ScaleParams scale{output, p.terms, static_cast<int>(map.channels)};
      launch(call.stream(), scale_sums_kernel<T>, ceil_div(map.channels, kSumThreads), kSumThreads, 0, scale);
      p.sums = output;
    }
    if (p.input_grad == nullptr && p.closed == nullptr) return;
    if (!training) p.x = nullptr;
    const auto kernel = kPool ? pool_input_grad_kernel<T, V> : input_grad_kernel<T, V>;
    launch(call.stream(), kernel, p.runs.blocks(), kPassThreads, 0, p);
  });
}

void check_sums(
    const std::optional<Tensor>& x, const std::optional<Tensor>& sums, const std::optional<Tensor>& input_grad, bool training,
    const Map& map, ScalarType dtype) {
  if (x) check_same(*x, "x", map, dtype);
  if (input_grad) check_same(*input_grad, "input_grad", map, dtype);
  STD_TORCH_CHECK(sums.has_value() == x.has_value(), "fastconv_native: sums are written where x is given, and only there");
  if (sums) check_floats(*sums, "sums", 2, map);
  STD_TORCH_CHECK(
      x || (input_grad && !training), "fastconv_native: x is needed but for the gradient of constant statistics");
}

}  // namespace

void batch_norm_relu_backward(
    const Tensor& grad, const std::optional<Tensor>& gate, const std::optional<Tensor>& x, const Tensor& mean,
    const Tensor& var, const std::optional<Tensor>& weight, double eps, bool training, const std::optional<Tensor>& sums,
    const std::optional<Tensor>& input_grad, const std::optional<Tensor>& closed) {
  const Map map = map_of(grad, "grad");
  const ScalarType dtype = grad.scalar_type();
  if (gate) check_same(*gate, "gate", map, dtype);
  if (closed) check_same(*closed, "closed", map, dtype);
  check_sums(x, sums, input_grad, training, map, dtype);
  const Call call(grad);
  by_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::T;
    BackwardParams<T> p{};
    p.grad = call.read<T>(grad);
    p.gate = call.read<T>(gate);
    p.input_grad = call.write<T>(input_grad);
    p.closed = call.write<T>(closed);
    p.terms = Terms::of(call, mean, var, weight, {}, eps, map, dtype);
    backward<T, false>(call, p, grad, x, sums, training, map, map);
  });
}

void batch_norm_relu_max_pool2d_backward(
    const Tensor& grad, const Tensor& code, const std::optional<Tensor>& x, const Tensor& mean, const Tensor& var,
    const std::optional<Tensor>& weight, double eps, bool training, const std::optional<Tensor>& sums,
    const std::optional<Tensor>& input_grad) {
  const Map pooled = map_of(grad, "grad");
  const ScalarType dtype = grad.scalar_type();
  check_same(code, "code", pooled, ScalarType::Byte);
  STD_TORCH_CHECK(x || input_grad, "fastconv_native: neither sums nor a gradient are wanted");
  const Map map = x ? map_of(*x, "x") : map_of(*input_grad, "input_grad");
  check_sums(x, sums, input_grad, training, map, dtype);
  STD_TORCH_CHECK(
      pooled == (Map{map.batch, map.channels, map.height / 2, map.width / 2}), "fastconv_native: grad has a wrong size");
  const Call call(grad);
  by_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::T;
    BackwardParams<T> p{};
    p.grad = call.read<T>(grad);
    p.code = call.read<uint8_t>(code);
    p.input_grad = call.write<T>(input_grad);
    p.terms = Terms::of(call, mean, var, weight, {}, eps, map, dtype);
    backward<T, true>(call, p, grad, x, sums, training, map, pooled);
  });
}

}  // namespace fastconv
