// What the passes of a batch normalisation share: operands of a value a channel.
#pragma once

#include "pixels.h"
#include "values.h"
#include "windows.h"

namespace fastconv {

// One value a channel, of the map's dtype or of float32, `stride` elements apart.
struct ChannelValues {
  const void* first;  // null: the value is not there
  int64_t stride;
  bool is_float;

  template <class T>
  FASTCONV_DEVICE float at(int channel, float absent) const {
    if (first == nullptr) return absent;
    if (is_float) return load<float>(static_cast<const float*>(first) + channel * stride);
    return widen(load<T>(static_cast<const T*>(first) + channel * stride));
  }
};

inline ChannelValues channel_values(
    const Call& call, const std::optional<Tensor>& tensor, const char* name, const Map& map, ScalarType dtype) {
  if (!tensor) return {nullptr, 0, false};
  STD_TORCH_CHECK(
      tensor->dim() == 1 && tensor->size(0) == map.channels, "fastconv_native: ", name, " must have one value for each channel");
  const bool is_float = tensor->scalar_type() == ScalarType::Float;
  STD_TORCH_CHECK(is_float || tensor->scalar_type() == dtype, "fastconv_native: ", name, " has a wrong dtype");
  return {call.read_strided(*tensor), tensor->stride(0), is_float};
}

// Outputs of float32 values, `rows` for each channel.
inline void check_floats(const Tensor& tensor, const char* name, int64_t rows, const Map& map) {
  STD_TORCH_CHECK(
      tensor.numel() == rows * map.channels && tensor.is_contiguous() && tensor.scalar_type() == ScalarType::Float,
      "fastconv_native: ", name, " must hold ", rows, " float32 value(s) for each channel");
}

// A channel's normalisation: (x − mean) · inverse · weight + bias.
struct Terms {
  ChannelValues mean, var, weight, bias;
  float eps;

  static Terms of(
      const Call& call, const Tensor& mean, const Tensor& var, const std::optional<Tensor>& weight,
      const std::optional<Tensor>& bias, double eps, const Map& map, ScalarType dtype) {
    return {
        channel_values(call, mean, "mean", map, dtype), channel_values(call, var, "var", map, dtype),
        channel_values(call, weight, "weight", map, dtype), channel_values(call, bias, "bias", map, dtype),
        static_cast<float>(eps)};
  }

  template <class T>
  FASTCONV_DEVICE float inverse_at(int channel) const {
    return 1.0f / sqrtf(var.at<T>(channel, 1.0f) + eps);
  }
};

// The terms of a thread's vector of channels.
template <int V>
struct Normalisation {
  float mean[V], scale[V], bias[V];

  template <class T>
  static FASTCONV_DEVICE Normalisation of(const Terms& terms, int channel, int channels) {
    Normalisation result;
    FASTCONV_UNROLL
    for (int i = 0; i < V; ++i) {
      const bool is_there = channel + i < channels;
      result.mean[i] = is_there ? terms.mean.at<T>(channel + i, 0.0f) : 0.0f;
      result.scale[i] = is_there ? terms.inverse_at<T>(channel + i) * terms.weight.at<T>(channel + i, 1.0f) : 0.0f;
      result.bias[i] = is_there ? terms.bias.at<T>(channel + i, 0.0f) : 0.0f;
    }
    return result;
  }

  FASTCONV_DEVICE float operator()(float x, int i) const { return (x - mean[i]) * scale[i] + bias[i]; }
};

}  // namespace fastconv
