// Batch normalisation's forward over NHWC maps: statistics in one pass, normalisation with residual and ReLU in another.
#include "batch_norm.h"
#include "operators.h"

#include <limits>

namespace fastconv {

namespace {

// A value near the mean of pixels [begin, end), from the first of them: sums of distances to it lose no digits to a mean far
// from 0. Finite, so that infinities stay what they are.
template <class T>
Floats pivots(const T* x, int64_t channels, int64_t begin, int64_t end) {
  constexpr int64_t kPixels = 8;
  end = std::min(end, begin + kPixels);
  Floats values(channels, 0.0f);
  for (int64_t pixel = begin; pixel < end; ++pixel) {
    for (int64_t c = 0; c < channels; ++c) values[c] += load(x[pixel * channels + c]);
  }
  for (float& value : values) {
    value /= static_cast<float>(end - begin);
    value = std::abs(value) <= std::numeric_limits<float>::max() ? value : 0.0f;
  }
  return values;
}

// Of one chunk and channel.
struct Moments {
  double mean, squares;  // squares: of the distances to this mean, summed
};

// Chunks in order. An infinity leaves a mean of ±infinity and no variance, as it does in torch.
void combine(
    const std::vector<Moments>& moments, const std::vector<double>& pixels, int64_t channels, float* mean, float* var) {
  const int64_t chunks = static_cast<int64_t>(pixels.size());
  const double count = std::accumulate(pixels.begin(), pixels.end(), 0.0);
  const Chunks parts = Chunks::of(channels, 2 * chunks, channels);
  for_chunks(parts.count, [&](int64_t first, int64_t last) FASTCONV_INLINE_LAMBDA {
    for (int64_t c = parts.begin(first); c < parts.end(last - 1); ++c) {
      double total = 0, squares = 0;
      for (int64_t k = 0; k < chunks; ++k) total += pixels[k] * moments[k * channels + c].mean;
      const double center = count == 0 ? 0 : total / count;
      for (int64_t k = 0; k < chunks; ++k) {
        const Moments& m = moments[k * channels + c];
        squares += m.squares + pixels[k] * (m.mean - center) * (m.mean - center);
      }
      mean[c] = static_cast<float>(center);
      var[c] = count == 0 ? 0 : static_cast<float>(squares / count);
    }
  });
}

template <class T>
void statistics(const T* x, const Map& map, float* mean, float* var) {
  const Rows rows = Rows::of(map);
  const int64_t channels = map.channels;
  const Chunks chunks = summing_chunks(rows.count, rows.width);
  std::vector<Moments> moments(chunks.count * channels);
  std::vector<double> pixels(chunks.count);
  for_chunks(chunks.count, [&](int64_t first, int64_t last) FASTCONV_INLINE_LAMBDA {
    for (int64_t chunk = first; chunk < last; ++chunk) {
      const int64_t begin = rows.start(chunks.begin(chunk)) / channels, end = rows.start(chunks.end(chunk)) / channels;
      const Floats pivot = pivots(x, channels, begin, end);
      const Floats row = repeated(pivot, rows.width);
      TwoSums sums(channels, rows.width);
      const float* const near = row.data();
      const T* const values = x;
      sums.add_rows<1>(
          rows, chunks.begin(chunk), chunks.end(chunk), [=](int64_t i, int64_t j) FASTCONV_INLINE_LAMBDA -> Terms {
            const float distance = load(values[i]) - near[j];
            return {distance, distance * distance};
          });
      pixels[chunk] = static_cast<double>(end - begin);
      const double share = 1 / pixels[chunk];
      for (int64_t c = 0; c < channels; ++c) {
        const double sum = sums.sums()[c], squares = sums.sums()[channels + c] - sum * sum * share;
        // A comparison that is false for NaN.
        moments[chunk * channels + c] = {pivot[c] + sum * share, squares < 0 ? 0 : squares};
      }
    }
  });
  combine(moments, pixels, channels, mean, var);
}

template <bool kResidual, bool kRelu, class T>
FASTCONV_INLINE void normalise(
    const T* x, const T* residual, T* output, const float* mean, const float* scale, const float* bias, int64_t elements) {
  FASTCONV_VECTORIZE
  for (int64_t j = 0; j < elements; ++j) {
    float y = (load(x[j]) - mean[j]) * scale[j] + bias[j];
    if (kResidual) y += load(residual[j]);
    if (kRelu) y = keep_if(!(y <= 0), y);
    output[j] = round_to<T>(y);
  }
}

void update(const Tensor& running, const char* name, const Floats& batch, double momentum, double factor) {
  const int64_t channels = static_cast<int64_t>(batch.size());
  Floats values = channel_values(running, name, channels);
  const int64_t stride = running.stride(0);
  by_dtype(running.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    T* const data = write<T>(running);
    for (int64_t c = 0; c < channels; ++c) {
      const double moved = (1 - momentum) * values[c] + momentum * factor * batch[c];
      data[c * stride] = round_to<T>(static_cast<float>(moved));
    }
  });
}

}  // namespace

void batch_norm_statistics(const Tensor& x, const Tensor& mean, const Tensor& var) {
  const Map map = map_of(x, "x");
  check_channels(mean, "mean", map);
  check_channels(var, "var", map);
  by_dtype(x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    statistics(read<T>(x), map, write<float>(mean), write<float>(var));
  });
}

void batch_norm_relu(
    const Tensor& x, const Tensor& mean, const Tensor& var, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& residual, double eps, bool relu, const Tensor& output) {
  const Map map = map_of(x, "x");
  check_same(output, "output", map, x.scalar_type());
  if (residual) check_same(*residual, "residual", map, x.scalar_type());
  const Rows rows = Rows::of(map);
  const Floats means = repeated(channel_values(mean, "mean", map.channels), rows.width);
  const std::vector<double> inverse = inverse_deviation(var, map.channels, eps);
  const Floats scales = repeated(channel_scale(weight, inverse), rows.width);
  const Floats biases = repeated(channel_values(bias, "bias", map.channels, 0.0f), rows.width);
  const Chunks chunks = Chunks::of(rows.count, rows.width, rows.count);
  by_dtype(x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const T* const in = read<T>(x);
    const T* const added = residual ? read<T>(*residual) : in;
    T* const out = write<T>(output);
    by_flag(residual.has_value(), [&](auto with_residual) {
      by_flag(relu, [&](auto with_relu) {
        for_chunks(chunks.count, [&](int64_t first, int64_t last) FASTCONV_INLINE_LAMBDA {
          // Backwards: what the pass over the statistics read last is still in cache.
          for (int64_t chunk = first; chunk < last; ++chunk) {
            for (int64_t row = chunks.begin(chunk); row < chunks.end(chunk); ++row) {
              const int64_t i = rows.start(row);
              normalise<with_residual.value, with_relu.value>(
                  in + i, added + i, out + i, means.data(), scales.data(), biases.data(), rows.start(row + 1) - i);
            }
          }
        });
      });
    });
  });
}

void batch_norm_update(
    const Tensor& running_mean, const Tensor& running_var, const Tensor& mean, const Tensor& var, double momentum,
    double unbiased) {
  const int64_t channels = mean.numel();
  update(running_mean, "running_mean", channel_values(mean, "mean", channels), momentum, 1);
  update(running_var, "running_var", channel_values(var, "var", channels), momentum, unbiased);
}

}  // namespace fastconv
