// Batch normalisation's backward behind a ReLU: the two sums in one pass, the input's gradient in another, or in the same
// one where the statistics do not depend on the input.
#include "batch_norm.h"
#include "operators.h"

namespace fastconv {

namespace {

// Outputs of a pass over the closed gradient; null where they are not wanted.
template <class T>
struct Written {
  T* input_grad;
  T* closed;
};

template <bool kGate, class T>
FASTCONV_INLINE T closed_grad(const T* grad, const T* gate, int64_t i) {
  if constexpr (!kGate) return grad[i];
  return keep_if(!(load(gate[i]) <= 0), grad[i]);
}

template <bool kGate, class T>
FASTCONV_INLINE float closed_value(const T* grad, const T* gate, int64_t i) {
  if constexpr (!kGate) return load(grad[i]);
  return keep_if(!(load(gate[i]) <= 0), load(grad[i]));
}

// body(begin, end) over rows in parallel, the last chunk of a thread's first.
template <class Body>
void for_rows_backwards(const Rows& rows, const Body& body) {
  const Chunks chunks = Chunks::of(rows.count, rows.width, rows.count);
  for_chunks(chunks.count, [&](int64_t first, int64_t last) FASTCONV_INLINE_LAMBDA {
    for (int64_t chunk = first; chunk < last; ++chunk) {
      for (int64_t row = chunks.begin(chunk); row < chunks.end(chunk); ++row) {
        const int64_t begin = rows.start(row);
        body(begin, rows.start(row + 1) - begin);
      }
    }
  });
}

// The two sums, and on the way what `written` asks for, the input's gradient as that of constant statistics.
template <bool kGate, bool kInput, bool kClosed, class T>
void sum(
    const T* grad, const T* gate, const T* x, const Floats& means, const Floats& scales,
    const Written<T>& written, const Rows& rows, const Chunks& chunks, GradSums& output) {
  for_chunks(chunks.count, [&](int64_t first, int64_t last) FASTCONV_INLINE_LAMBDA {
    const float* const mean = means.data();
    const float* const scale = scales.data();
    T* const input_grad = written.input_grad;
    T* const closed = written.closed;
    for (int64_t chunk = first; chunk < last; ++chunk) {
      TwoSums sums(rows.channels, rows.width);
      sums.add_rows<1>(
          rows, chunks.begin(chunk), chunks.end(chunk), [=](int64_t i, int64_t j) FASTCONV_INLINE_LAMBDA -> Terms {
            const float g = closed_value<kGate>(grad, gate, i);
            if constexpr (kClosed) closed[i] = closed_grad<kGate>(grad, gate, i);
            if constexpr (kInput) input_grad[i] = round_to<T>(g * scale[j]);
            return {g, g * (load(x[i]) - mean[j])};
          });
      output.keep(chunk, sums);
    }
  });
}

template <bool kGate, class T>
void input_grad_of_constants(
    const T* grad, const T* gate, const Floats& scales, const Written<T>& written, const Rows& rows) {
  by_flag(written.closed != nullptr, [&](auto with_closed) {
    for_rows_backwards(rows, [&](int64_t begin, int64_t elements) FASTCONV_INLINE_LAMBDA {
      const T* const g = grad + begin;
      const T* const y = gate + begin;
      const float* const scale = scales.data();
      T* const out = written.input_grad + begin;
      T* const closed = with_closed.value ? written.closed + begin : nullptr;
      FASTCONV_VECTORIZE
      for (int64_t j = 0; j < elements; ++j) {
        if constexpr (with_closed.value) closed[j] = closed_grad<kGate>(g, y, j);
        out[j] = round_to<T>(closed_value<kGate>(g, y, j) * scale[j]);
      }
    });
  });
}

template <bool kGate, class T>
void input_grad_of_batch(const T* grad, const T* gate, const T* x, const InputGrad& terms, T* input_grad, const Rows& rows) {
  const Floats means = repeated(terms.mean, rows.width), scales = repeated(terms.scale, rows.width);
  const Floats grad_means = repeated(terms.grad_mean, rows.width), slopes = repeated(terms.slope, rows.width);
  for_rows_backwards(rows, [&](int64_t begin, int64_t elements) FASTCONV_INLINE_LAMBDA {
    const T* const g = grad + begin;
    const T* const y = gate + begin;
    const T* const in = x + begin;
    T* const out = input_grad + begin;
    const float* const mean = means.data();
    const float* const scale = scales.data();
    const float* const grad_mean = grad_means.data();
    const float* const slope = slopes.data();
    FASTCONV_VECTORIZE
    for (int64_t j = 0; j < elements; ++j) {
      const float kept = closed_value<kGate>(g, y, j);
      out[j] = round_to<T>(varying_grad(kept, load(in[j]), mean[j], scale[j], grad_mean[j], slope[j]));
    }
  });
}

template <bool kGate, class T>
void backward(
    const T* grad, const T* gate, const T* x, InputGrad terms, const std::vector<double>& inverse, bool training,
    float* sums_output, const Written<T>& written, const Map& map) {
  const Rows rows = Rows::of(map);
  const Floats scales = repeated(terms.scale, rows.width);
  if (x == nullptr) return input_grad_of_constants<kGate>(grad, gate, scales, written, rows);
  const Floats means = repeated(terms.mean, rows.width);
  const Chunks chunks = summing_chunks(rows.count, rows.width);
  GradSums sums(chunks.count, map.channels);
  const bool of_batch = training && written.input_grad != nullptr;
  by_flag(written.input_grad != nullptr && !training, [&](auto with_input) {
    by_flag(written.closed != nullptr, [&](auto with_closed) {
      sum<kGate, with_input.value, with_closed.value>(grad, gate, x, means, scales, written, rows, chunks, sums);
    });
  });
  sums.total(inverse, sums_output);
  if (!of_batch) return;
  terms.depend(sums, inverse, map.pixels());
  const T* const closed = written.closed;
  if (closed != nullptr) return input_grad_of_batch<false>(closed, closed, x, terms, written.input_grad, rows);
  input_grad_of_batch<kGate>(grad, gate, x, terms, written.input_grad, rows);
}

}  // namespace

void batch_norm_relu_backward(
    const Tensor& grad, const std::optional<Tensor>& gate, const std::optional<Tensor>& x, const Tensor& mean,
    const Tensor& var, const std::optional<Tensor>& weight, double eps, bool training, const std::optional<Tensor>& sums,
    const std::optional<Tensor>& input_grad, const std::optional<Tensor>& closed) {
  const Map map = map_of(grad, "grad");
  const ScalarType dtype = grad.scalar_type();
  if (gate) check_same(*gate, "gate", map, dtype);
  if (x) check_same(*x, "x", map, dtype);
  if (input_grad) check_same(*input_grad, "input_grad", map, dtype);
  if (closed) check_same(*closed, "closed", map, dtype);
  check_sums(sums, x.has_value(), map);
  STD_TORCH_CHECK(x || (input_grad && !training), "fastconv_native: x is needed but for the gradient of constant statistics");
  const std::vector<double> inverse = inverse_deviation(var, map.channels, eps);
  const InputGrad terms(channel_values(mean, "mean", map.channels), channel_scale(weight, inverse));
  by_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const T* const g = read<T>(grad);
    const T* const y = gate ? read<T>(*gate) : g;
    const T* const in = x ? read<T>(*x) : nullptr;
    const Written<T> written{input_grad ? write<T>(*input_grad) : nullptr, closed ? write<T>(*closed) : nullptr};
    by_flag(gate.has_value(), [&](auto with_gate) {
      backward<with_gate.value>(g, y, in, terms, inverse, training, sums ? write<float>(*sums) : nullptr, written, map);
    });
  });
}

}  // namespace fastconv
