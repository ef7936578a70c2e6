// Batch normalisation with ReLU and a 2x2 max-pool of stride 2: the map between the two never reaches memory, and backward
// closes and un-pools the gradient in each of its passes.
#include "batch_norm.h"
#include "operators.h"

namespace fastconv {

namespace {

// Rows of windows. A map with an odd side has a row or a column of pixels that no window covers.
struct Pooling {
  int64_t batch, channels, height, width, pooled_height, pooled_width;

  static Pooling of(const Map& map, const Map& pooled) {
    STD_TORCH_CHECK(
        pooled.batch == map.batch && pooled.channels == map.channels && pooled.height == map.height / 2 &&
            pooled.width == map.width / 2,
        "fastconv_native: a pooled map must have half the sides of its map, rounded down");
    return {map.batch, map.channels, map.height, map.width, pooled.height, pooled.width};
  }

  int64_t items() const { return batch * pooled_height; }
  int64_t cost() const { return 2 * width * channels; }
  FASTCONV_INLINE int64_t pooled_start(int64_t item) const { return item * pooled_width * channels; }
  // The upper left pixel of a row's first window.
  FASTCONV_INLINE int64_t start(int64_t item) const {
    return (item / pooled_height * height + item % pooled_height * 2) * width * channels;
  }
  FASTCONV_INLINE bool is_last(int64_t item) const { return item % pooled_height == pooled_height - 1; }
};

// What lies around a window's four pixels.
template <class T>
struct Window {
  T* top;
  T* bottom;
};

// torch's rule: the first of equal maxima, the last of NaN.
template <bool kResidual, class T>
FASTCONV_INLINE void pool_window(
    const Window<const T>& x, const Window<const T>& residual, T* output, uint8_t* code, const float* mean,
    const float* scale, const float* bias, int64_t channels) {
  const T* const taps[4] = {x.top, x.top + channels, x.bottom, x.bottom + channels};
  const T* const added[4] = {residual.top, residual.top + channels, residual.bottom, residual.bottom + channels};
  FASTCONV_VECTORIZE
  for (int64_t c = 0; c < channels; ++c) {
    const float m = mean[c], s = scale[c], b = bias[c];
    float best = (load(taps[0][c]) - m) * s + b;
    if (kResidual) best += load(added[0][c]);
    int32_t winner = 1;
    for (int tap = 1; tap < 4; ++tap) {
      float y = (load(taps[tap][c]) - m) * s + b;
      if (kResidual) y += load(added[tap][c]);
      const bool better = (y > best) | (y != y);
      best = better ? y : best;
      winner = better ? tap + 1 : winner;
    }
    const bool open = !(best <= 0);
    output[c] = round_to<T>(keep_if(open, best));
    code[c] = static_cast<uint8_t>(keep_if(open, winner));
  }
}

template <bool kResidual, class T>
void pool(
    const T* x, const T* residual, T* output, uint8_t* code, const Floats& means,
    const Floats& scales, const Floats& biases, const Pooling& p) {
  const Chunks chunks = Chunks::of(p.items(), p.cost(), p.items());
  for_chunks(chunks.count, [&](int64_t first, int64_t last) FASTCONV_INLINE_LAMBDA {
    const int64_t channels = p.channels, below = p.width * channels;
    // Backwards: what the pass over the statistics read last is still in cache.
    for (int64_t item = chunks.end(last - 1) - 1; item >= chunks.begin(first); --item) {
      int64_t i = p.start(item), o = p.pooled_start(item);
      for (int64_t column = 0; column < p.pooled_width; ++column, i += 2 * channels, o += channels) {
        pool_window<kResidual, T>(
            {x + i, x + i + below}, {residual + i, residual + i + below}, output + o, code + o, means.data(), scales.data(),
            biases.data(), channels);
      }
    }
  });
}

// Adds a window to the sums and, where kInput, writes its gradients as those of constant statistics.
template <bool kInput, class T>
FASTCONV_INLINE void sum_window(
    const T* grad, const uint8_t* code, const Window<const T>& x, const Window<T>& input_grad, float* first, float* second,
    const float* mean, const float* scale, int64_t channels) {
  const T* const taps[4] = {x.top, x.top + channels, x.bottom, x.bottom + channels};
  T* const grads[4] = {input_grad.top, input_grad.top + channels, input_grad.bottom, input_grad.bottom + channels};
  FASTCONV_VECTORIZE
  for (int64_t c = 0; c < channels; ++c) {
    const int32_t winner = code[c];
    const float g = load(grad[c]), m = mean[c];
    float products[4];  // of all taps, as NaN has to pass where torch lets it: through closed ones too
    for (int tap = 0; tap < 4; ++tap) products[tap] = keep_if(winner == tap + 1, g) * (load(taps[tap][c]) - m);
    first[c] += keep_if(winner != 0, g);
    second[c] += (products[0] + products[1]) + (products[2] + products[3]);
    if (kInput) {
      const T share = round_to<T>(g * scale[c]);
      for (int tap = 0; tap < 4; ++tap) grads[tap][c] = keep_if(winner == tap + 1, share);
    }
  }
}

// Where windows leave pixels of a row of windows over, `write(pixel offset, pixels)` for each of them: all but a row's windows.
template <class Write>
FASTCONV_INLINE void for_uncovered(const Pooling& p, int64_t item, const Write& write) {
  const int64_t i = p.start(item), row = p.width * p.channels, covered = 2 * p.pooled_width * p.channels;
  if (covered < row) {
    write(i + covered, 1);
    write(i + row + covered, 1);
  }
  if (p.is_last(item) && p.height % 2 == 1) write(i + 2 * row, p.width);
}

template <bool kInput, class T>
void sum(
    const T* grad, const uint8_t* code, const T* x, T* input_grad, const InputGrad& terms, const Pooling& p,
    const Chunks& chunks, GradSums& output) {
  constexpr int64_t kRun = 128;
  for_chunks(chunks.count, [&](int64_t first, int64_t last) FASTCONV_INLINE_LAMBDA {
    const int64_t channels = p.channels, below = p.width * channels;
    for (int64_t chunk = first; chunk < last; ++chunk) {
      TwoSums sums(channels, channels);
      int64_t run = 0;
      for (int64_t item = chunks.begin(chunk); item < chunks.end(chunk); ++item) {
        int64_t i = p.start(item), o = p.pooled_start(item);
        for (int64_t column = 0; column < p.pooled_width; ++column, i += 2 * channels, o += channels) {
          sum_window<kInput, T>(
              grad + o, code + o, {x + i, x + i + below}, {input_grad + i, input_grad + i + below}, sums.first(),
              sums.second(), terms.mean.data(), terms.scale.data(), channels);
          if (++run % kRun == 0) sums.fold();
        }
        if (kInput) {
          for_uncovered(p, item, [&](int64_t begin, int64_t pixels) FASTCONV_INLINE_LAMBDA {
            std::memset(static_cast<void*>(input_grad + begin), 0, pixels * channels * sizeof(T));
          });
        }
      }
      sums.fold();
      output.keep(chunk, sums);
    }
  });
}

template <class T>
FASTCONV_INLINE void spread_window(
    const T* grad, const uint8_t* code, const Window<T>& input_grad, const float* scale, int64_t channels) {
  T* const grads[4] = {input_grad.top, input_grad.top + channels, input_grad.bottom, input_grad.bottom + channels};
  FASTCONV_VECTORIZE
  for (int64_t c = 0; c < channels; ++c) {
    const int32_t winner = code[c];
    const T share = round_to<T>(load(grad[c]) * scale[c]);
    for (int tap = 0; tap < 4; ++tap) grads[tap][c] = keep_if(winner == tap + 1, share);
  }
}

template <class T>
FASTCONV_INLINE void vary_window(
    const T* grad, const uint8_t* code, const Window<const T>& x, const Window<T>& input_grad, const float* mean,
    const float* scale, const float* grad_mean, const float* slope, int64_t channels) {
  const T* const taps[4] = {x.top, x.top + channels, x.bottom, x.bottom + channels};
  T* const grads[4] = {input_grad.top, input_grad.top + channels, input_grad.bottom, input_grad.bottom + channels};
  FASTCONV_VECTORIZE
  for (int64_t c = 0; c < channels; ++c) {
    const int32_t winner = code[c];
    const float g = load(grad[c]), m = mean[c], s = scale[c], gm = grad_mean[c], sl = slope[c];
    for (int tap = 0; tap < 4; ++tap) {
      grads[tap][c] = round_to<T>(varying_grad(keep_if(winner == tap + 1, g), load(taps[tap][c]), m, s, gm, sl));
    }
  }
}

// The input's gradient: with x as that of the batch's statistics, else of constant ones.
template <bool kBatch, class T>
void write_input_grad(
    const T* grad, const uint8_t* code, const T* x, T* input_grad, const InputGrad& terms, const Pooling& p) {
  const Chunks chunks = Chunks::of(p.items(), p.cost(), p.items());
  for_chunks(chunks.count, [&](int64_t first, int64_t last) FASTCONV_INLINE_LAMBDA {
    const int64_t channels = p.channels, below = p.width * channels;
    const float* const mean = terms.mean.data();
    const float* const scale = terms.scale.data();
    const float* const grad_mean = terms.grad_mean.data();
    const float* const slope = terms.slope.data();
    for (int64_t item = chunks.end(last - 1) - 1; item >= chunks.begin(first); --item) {
      int64_t i = p.start(item), o = p.pooled_start(item);
      for (int64_t column = 0; column < p.pooled_width; ++column, i += 2 * channels, o += channels) {
        const Window<T> grads{input_grad + i, input_grad + i + below};
        if constexpr (kBatch) {
          vary_window<T>(grad + o, code + o, {x + i, x + i + below}, grads, mean, scale, grad_mean, slope, channels);
        } else {
          spread_window<T>(grad + o, code + o, grads, scale, channels);
        }
      }
      for_uncovered(p, item, [&](int64_t begin, int64_t pixels) FASTCONV_INLINE_LAMBDA {
        for (int64_t pixel = 0; pixel < pixels; ++pixel, begin += channels) {
          T* const output = input_grad + begin;
          const T* const in = kBatch ? x + begin : nullptr;
          FASTCONV_VECTORIZE
          for (int64_t c = 0; c < channels; ++c) {
            const float g = kBatch ? varying_grad(0, load(in[c]), mean[c], scale[c], grad_mean[c], slope[c]) : 0.0f;
            output[c] = round_to<T>(g);
          }
        }
      });
    }
  });
}

}  // namespace

void batch_norm_relu_max_pool2d(
    const Tensor& x, const Tensor& mean, const Tensor& var, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& residual, double eps, const Tensor& output,
    const Tensor& code) {
  const Map map = map_of(x, "x"), pooled = map_of(output, "output");
  const Pooling p = Pooling::of(map, pooled);
  check_same(output, "output", pooled, x.scalar_type());
  check_same(code, "code", pooled, ScalarType::Byte);
  if (residual) check_same(*residual, "residual", map, x.scalar_type());
  const Floats means = channel_values(mean, "mean", map.channels);
  const Floats scales = channel_scale(weight, inverse_deviation(var, map.channels, eps));
  const Floats biases = channel_values(bias, "bias", map.channels, 0.0f);
  by_dtype(x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const T* const in = read<T>(x);
    by_flag(residual.has_value(), [&](auto with_residual) {
      const T* const added = with_residual.value ? read<T>(*residual) : in;
      pool<with_residual.value>(in, added, write<T>(output), write<uint8_t>(code), means, scales, biases, p);
    });
  });
}

void batch_norm_relu_max_pool2d_backward(
    const Tensor& grad, const Tensor& code, const std::optional<Tensor>& x, const Tensor& mean, const Tensor& var,
    const std::optional<Tensor>& weight, double eps, bool training, const std::optional<Tensor>& sums,
    const std::optional<Tensor>& input_grad) {
  const ScalarType dtype = grad.scalar_type();
  const Map pooled = map_of(grad, "grad");
  STD_TORCH_CHECK(x || (input_grad && !training), "fastconv_native: x is needed but for the gradient of constant statistics");
  const Map map = map_of(x ? *x : *input_grad, "x");
  const Pooling p = Pooling::of(map, pooled);
  check_same(code, "code", pooled, ScalarType::Byte);
  if (x) check_same(*x, "x", map, dtype);
  if (input_grad) check_same(*input_grad, "input_grad", map, dtype);
  check_sums(sums, x.has_value(), map);
  const std::vector<double> inverse = inverse_deviation(var, map.channels, eps);
  InputGrad terms(channel_values(mean, "mean", map.channels), channel_scale(weight, inverse));
  by_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const T* const g = read<T>(grad);
    const uint8_t* const k = read<uint8_t>(code);
    T* const out = input_grad ? write<T>(*input_grad) : nullptr;
    if (!x) return write_input_grad<false>(g, k, static_cast<const T*>(nullptr), out, terms, p);
    const Chunks chunks = summing_chunks(p.items(), p.cost());
    GradSums partials(chunks.count, map.channels);
    by_flag(out != nullptr && !training, [&](auto with_input) {
      sum<with_input.value>(g, k, read<T>(*x), out, terms, p, chunks, partials);
    });
    partials.total(inverse, write<float>(*sums));
    if (out == nullptr || !training) return;
    terms.depend(partials, inverse, map.pixels());
    write_input_grad<true>(g, k, read<T>(*x), out, terms, p);
  });
}

}  // namespace fastconv
