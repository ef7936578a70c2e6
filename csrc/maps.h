// The sizes of dense channels_last (NHWC) tensors, checked: kernels of every device read what they are handed blindly.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <vector>

namespace fastconv {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Pair = std::vector<int64_t>;

struct Map {
  int64_t batch, channels, height, width;

  int64_t pixels() const { return batch * height * width; }
  int64_t numel() const { return pixels() * channels; }
  bool operator==(const Map& other) const {
    return batch == other.batch && channels == other.channels && height == other.height && width == other.width;
  }
};

// The launchers hand over dense channels_last tensors; anything else would be read out of bounds, so it is checked here.
inline Map map_of(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 4, "fastconv_native: ", name, " must have 4 dimensions, got ", tensor.dim());
  const auto sizes = tensor.sizes();
  const auto strides = tensor.strides();
  const Map map{sizes[0], sizes[1], sizes[2], sizes[3]};
  STD_TORCH_CHECK(map.channels > 0, "fastconv_native: ", name, " must have a channel");
  const auto dense = [&](int64_t dimension, int64_t stride) {
    return sizes[dimension] == 1 || strides[dimension] == stride;
  };
  STD_TORCH_CHECK(
      dense(1, 1) && dense(3, map.channels) && dense(2, map.channels * map.width) &&
          dense(0, map.channels * map.width * map.height),
      "fastconv_native: ", name, " must be dense in channels_last memory format");
  return map;
}

inline void check_same(const Tensor& tensor, const char* name, const Map& map, ScalarType dtype) {
  STD_TORCH_CHECK(map_of(tensor, name) == map, "fastconv_native: ", name, " has a wrong size");
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, "fastconv_native: ", name, " has a wrong dtype");
}

// Whether a map of size `there` along a dimension holds what a convolution gives there, `out` pixels, or as many windows of a
// 2×2 pool as lie in them, with or without the one that hangs over.
inline bool holds(int64_t out, int64_t there, bool pooled) {
  return pooled ? there > 0 && (there == out / 2 || there == (out + 1) / 2) : there == out;
}

// A bias, or its gradient: one element for each channel of `map`.
inline void check_bias(const std::optional<Tensor>& bias, const Map& map, ScalarType dtype) {
  if (!bias) return;
  STD_TORCH_CHECK(
      bias->dim() == 1 && bias->size(0) == map.channels && bias->is_contiguous() && bias->scalar_type() == dtype,
      "fastconv_native: a bias must hold one element of its map's dtype for each channel");
}

}  // namespace fastconv
