// What the passes of a batch normalisation share: rows that fill vectors, the values of a channel, sums over a map.
#pragma once

#include "memory.h"
#include "tensors.h"

#include <cmath>
#include <numeric>
#include <optional>
#include <vector>

namespace fastconv {

// body(std::true_type) or body(std::false_type): a condition that inner loops must not test.
template <class Body>
void by_flag(bool flag, const Body& body) {
  flag ? body(std::true_type{}) : body(std::false_type{});
}

// Asks for what a pass reads or writes a page from here. The processor's own prefetching falls behind where several streams
// come from memory; with this, passes over cold maps are 1.4 to 1.7 times as fast.
template <class T>
FASTCONV_INLINE void prefetch(const T* data, int64_t elements) {
  constexpr uintptr_t kAhead = 4096, kLine = 64;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data) + kAhead, bytes = elements * sizeof(T);
  for (uintptr_t line = 0; line < bytes; line += kLine) __builtin_prefetch(reinterpret_cast<const void*>(begin + line));
}

// A map as rows of `width` elements, each of whole pixels: of as many as leave no tail of a vector, where channels are few.
// Element j of any row belongs to channel j % channels.
struct Rows {
  int64_t channels, width, numel, count;

  static Rows of(const Map& map) {
    constexpr int64_t kVector = 16, kFew = 128, kLeast = 256;
    int64_t pixels = 1;
    if (map.channels < kFew) {
      pixels = kVector / std::gcd(kVector, map.channels);
      while (pixels * map.channels < kLeast) pixels *= 2;
    }
    const int64_t width = pixels * map.channels;
    return {map.channels, width, map.numel(), ceil_div(map.numel(), width)};
  }

  // Elements before a row; behind the last one of all.
  FASTCONV_INLINE int64_t start(int64_t row) const { return std::min(row * width, numel); }
};

// One value for each element of a row, from one for each channel.
inline Floats repeated(const Floats& values, int64_t width) {
  Floats row(width);
  for (auto next = row.begin(); next != row.end();) next = std::copy(values.begin(), values.end(), next);
  return row;
}

// An operand of one value a channel, of any of the dtypes and any stride.
inline Floats channel_values(const Tensor& tensor, const char* name, int64_t channels) {
  STD_TORCH_CHECK(
      tensor.dim() == 1 && tensor.size(0) == channels, "fastconv_native: ", name, " must have one value for each channel");
  Floats values(channels);
  const int64_t stride = tensor.stride(0);
  by_dtype(tensor.scalar_type(), [&](auto type) {
    const auto* const data = read<typename decltype(type)::type>(tensor);
    for (int64_t c = 0; c < channels; ++c) values[c] = load(data[c * stride]);
  });
  return values;
}

inline Floats channel_values(
    const std::optional<Tensor>& tensor, const char* name, int64_t channels, float absent) {
  return tensor ? channel_values(*tensor, name, channels) : Floats(channels, absent);
}

// Outputs of one float32 value, or two, for each channel.
inline void check_channels(const Tensor& tensor, const char* name, const Map& map) {
  STD_TORCH_CHECK(
      tensor.dim() == 1 && tensor.size(0) == map.channels && tensor.is_contiguous() &&
          tensor.scalar_type() == ScalarType::Float,
      "fastconv_native: ", name, " must hold one float32 value for each channel");
}

inline void check_sums(const std::optional<Tensor>& sums, bool wanted, const Map& map) {
  STD_TORCH_CHECK(sums.has_value() == wanted, "fastconv_native: sums are written where x is given, and only there");
  if (!sums) return;
  STD_TORCH_CHECK(
      sums->dim() == 2 && sums->size(0) == 2 && sums->size(1) == map.channels && sums->is_contiguous() &&
          sums->scalar_type() == ScalarType::Float,
      "fastconv_native: sums must hold two float32 values for each channel");
}

// 1 / √(var + eps).
inline std::vector<double> inverse_deviation(const Tensor& var, int64_t channels, double eps) {
  std::vector<double> inverse(channels);
  const Floats values = channel_values(var, "var", channels);
  for (int64_t c = 0; c < channels; ++c) inverse[c] = 1.0 / std::sqrt(static_cast<double>(values[c]) + eps);
  return inverse;
}

// weight / √(var + eps).
inline Floats channel_scale(const std::optional<Tensor>& weight, const std::vector<double>& inverse) {
  Floats scale = channel_values(weight, "weight", static_cast<int64_t>(inverse.size()), 1.0f);
  for (size_t c = 0; c < inverse.size(); ++c) scale[c] = static_cast<float>(scale[c] * inverse[c]);
  return scale;
}

// What a pass adds up for an element.
struct Terms {
  float first, second;
};

// Two sums for each channel, of one chunk of a map: short runs in float32 lanes, one for each element of a row, and runs in
// float64.
class TwoSums {
 public:
  TwoSums(int64_t channels, int64_t width) : channels_(channels), width_(width), lanes_(2 * width), sums_(2 * channels) {}

  // Adds terms(i, j) for the elements i of rows [begin, end), j being i's place in its row; `streams` is what `terms` reads.
  template <class Value, class... Streams>
  FASTCONV_INLINE void add_rows(const Rows& rows, int64_t row, int64_t end, const Value& terms, const Streams*... streams) {
    constexpr int64_t kRun = 128;
    float* const first = lanes_.data();
    float* const second = first + width_;
    for (int64_t run = 0; row < end; ++row) {
      const int64_t i = rows.start(row), elements = rows.start(row + 1) - i;
      (prefetch(streams + i, elements), ...);
      FASTCONV_VECTORIZE
      for (int64_t j = 0; j < elements; ++j) {
        const Terms a = terms(i + j, j);
        first[j] += a.first;
        second[j] += a.second;
      }
      if (++run % kRun == 0) fold();
    }
    fold();
  }

  float* first() { return lanes_.data(); }
  float* second() { return lanes_.data() + width_; }

  // Ends a run.
  void fold() {
    for (int64_t sum = 0; sum < 2; ++sum) {
      double* const output = sums_.data() + sum * channels_;
      float* const lanes = lanes_.data() + sum * width_;
      for (int64_t j = 0; j < width_; j += channels_) {
        for (int64_t c = 0; c < channels_; ++c) output[c] += lanes[j + c];
      }
      std::fill_n(lanes, width_, 0.0f);
    }
  }

  // [2, channels]
  const double* sums() const { return sums_.data(); }

 private:
  int64_t channels_, width_;
  Floats lanes_;  // [2, width]
  std::vector<double> sums_;
};

// Chunks of a pass that sums `items` of `cost` elements. Each has work of its own for every channel: it should have twice the
// elements of others.
inline Chunks summing_chunks(int64_t items, int64_t cost) {
  constexpr int64_t kMostPartials = 128;
  return Chunks::of(items, (cost + 1) / 2, kMostPartials);
}

// Where backward's two sums go, and what the input gradient takes from them.
class GradSums {
 public:
  GradSums(int64_t chunks, int64_t channels) : channels_(channels), partials_(chunks * 2 * channels) {}

  void keep(int64_t chunk, const TwoSums& sums) {
    std::copy_n(sums.sums(), 2 * channels_, partials_.data() + chunk * 2 * channels_);
  }

  // Chunks in order; the second sum, of products with x - mean, becomes that of products with the normalised x.
  void total(const std::vector<double>& inverse, float* output) {
    for (int64_t first = 2 * channels_; first < static_cast<int64_t>(partials_.size()); first += 2 * channels_) {
      for (int64_t i = 0; i < 2 * channels_; ++i) partials_[i] += partials_[first + i];
    }
    partials_.resize(2 * channels_);  // zeros, where there was no chunk
    for (int64_t c = 0; c < channels_; ++c) partials_[channels_ + c] *= inverse[c];
    for (int64_t i = 0; i < 2 * channels_; ++i) output[i] = static_cast<float>(partials_[i]);
  }

  double grad(int64_t channel) const { return partials_[channel]; }
  double product(int64_t channel) const { return partials_[channels_ + channel]; }

 private:
  int64_t channels_;
  std::vector<double> partials_;  // [chunks, 2, channels]
};

// The input's gradient: scale · (grad − grad_mean − (x − mean) · slope), where the statistics depend on the input.
struct InputGrad {
  Floats mean, scale, grad_mean, slope;

  InputGrad(Floats means, Floats scales)
      : mean(std::move(means)), scale(std::move(scales)), grad_mean(mean.size()), slope(mean.size()) {}

  void depend(const GradSums& sums, const std::vector<double>& inverse, int64_t pixels) {
    for (size_t c = 0; c < mean.size(); ++c) {
      grad_mean[c] = static_cast<float>(sums.grad(c) / pixels);
      slope[c] = static_cast<float>(sums.product(c) * inverse[c] / pixels);
    }
  }
};

FASTCONV_INLINE float varying_grad(float grad, float x, float mean, float scale, float grad_mean, float slope) {
  return ((grad - grad_mean) - (x - mean) * slope) * scale;
}

}  // namespace fastconv
