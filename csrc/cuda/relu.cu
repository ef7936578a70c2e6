// ReLU's backward and bias gradients, in one pass over the gradient.
#include "pixels.h"
#include "../passes.h"

namespace fastconv {

template <class T>
struct MaskParams {
  const T* grad;
  const T* output;  // null: the gradient passes as it is
  T* masked;        // null: only sums are wanted; it may be the gradient itself
  float* rows;      // null: no sums are wanted
  Runs runs;
};

// masked = where(output <= 0, 0, grad), and its sums.
template <class T, int V>
__global__ void __launch_bounds__(kPassThreads, 2) mask_kernel(const MaskParams<T> p) {
  const int channel = channel_of<V>(p.runs);
  over_pixels<1, V>(p.runs, p.rows, [&](int pixel, float (&sums)[1][V]) {
    const int64_t offset = static_cast<int64_t>(pixel) * p.runs.channels + channel;
    float grad[V];
    load_own_values<T, V>(grad, p.grad + offset);
    if (p.output != nullptr) {
      float output[V];
      load_values<T, V>(output, p.output + offset);
      FASTCONV_UNROLL
      for (int i = 0; i < V; ++i) grad[i] = output[i] <= 0.0f ? 0.0f : grad[i];
    }
    FASTCONV_UNROLL
    for (int i = 0; i < V; ++i) sums[0][i] += grad[i];
    if (p.masked != nullptr) store_values<T, V>(p.masked + offset, grad);
  });
}

namespace {

void mask(const Tensor& grad, const Tensor* output, const Tensor* masked, const Tensor* bias_grad) {
  const Map map = map_of(grad, "grad");
  const Call call(grad);
  by_dtype(grad.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::T;
    MaskParams<T> p{};
    p.grad = call.read<T>(grad);
    p.output = output ? call.read<T>(*output) : nullptr;
    p.masked = masked ? call.write<T>(*masked) : nullptr;
    by_vector<T>(map.channels, {p.grad, p.output, p.masked}, [&](auto vector) {
      constexpr int V = decltype(vector)::value;
      p.runs = Runs::of(map.pixels(), map.channels, V);
      const Tensor rows = scratch(grad, {bias_grad ? p.runs.rows() : 0, map.channels});
      p.rows = bias_grad ? call.write<float>(rows) : nullptr;
      launch(call.stream(), mask_kernel<T, V>, p.runs.blocks(), kPassThreads, kSumBytes<1, V>, p);
      if (bias_grad) sum_rows(call.stream(), p.rows, p.runs.rows(), call.write<T>(*bias_grad), map.channels);
    });
  });
}

}  // namespace

void relu_backward(const Tensor& grad, const Tensor& output, const Tensor& masked, const std::optional<Tensor>& bias_grad) {
  const Map map = map_of(grad, "grad");
  check_same(output, "output", map, grad.scalar_type());
  check_same(masked, "masked", map, grad.scalar_type());
  check_bias(bias_grad, map, grad.scalar_type());
  mask(grad, &output, &masked, bias_grad ? &*bias_grad : nullptr);
}

void bias_grad(const Tensor& grad, const Tensor& bias_grad) {
  check_bias(bias_grad, map_of(grad, "grad"), grad.scalar_type());
  mask(grad, nullptr, nullptr, &bias_grad);
}

}  // namespace fastconv
