// Sums over (N, H, W) for each channel, in the same order whatever the number of threads: short runs of pixels in lanes,
// runs into a partial sum per chunk, chunks in order.
#pragma once

#include "tensors.h"

#include <vector>

namespace fastconv {

// sums[i % channels] += value(i) for i in [0, pixels * channels).
template <class Value>
FASTCONV_INLINE void add_to_channels(float* sums, int64_t pixels, int64_t channels, const Value& value) {
  constexpr int64_t kNarrow = 64, kWide = 512;
  float lanes[kWide];
  if (channels <= kNarrow) {
    // Several pixels side by side, so that few channels still fill vectors.
    const int64_t width = channels * (kNarrow / channels);
    const int64_t total = pixels * channels;
    std::fill_n(lanes, kNarrow, 0.0f);
    int64_t start = 0;
    if (width == kNarrow) {
      for (; start + kNarrow <= total; start += kNarrow) {
        FASTCONV_VECTORIZE
        for (int64_t i = 0; i < kNarrow; ++i) lanes[i] += value(start + i);
      }
    } else {
      for (; start + width <= total; start += width) {
        FASTCONV_VECTORIZE
        for (int64_t i = 0; i < width; ++i) lanes[i] += value(start + i);
      }
    }
    for (int64_t i = 0; i < total - start; ++i) lanes[i] += value(start + i);
    for (int64_t first = 0; first < width; first += channels) {
      for (int64_t c = 0; c < channels; ++c) sums[c] += lanes[first + c];
    }
    return;
  }
  for (int64_t first = 0; first < channels; first += kWide) {
    const int64_t width = std::min(kWide, channels - first);
    std::fill_n(lanes, width, 0.0f);
    for (int64_t pixel = 0; pixel < pixels; ++pixel) {
      const int64_t start = pixel * channels + first;
      FASTCONV_VECTORIZE
      for (int64_t i = 0; i < width; ++i) lanes[i] += value(start + i);
    }
    for (int64_t i = 0; i < width; ++i) sums[first + i] += lanes[i];
  }
}

class ChannelSums {
 public:
  static constexpr int64_t kMostChunks = 128;

  ChannelSums(int64_t chunks, int64_t channels) : channels_(channels), sums_(chunks * channels, 0.0f) {}

  float* of_chunk(int64_t chunk) { return sums_.data() + chunk * channels_; }

  template <class T>
  void write_to(T* output) const {
    std::vector<float> total(channels_, 0.0f);
    for (size_t first = 0; first < sums_.size(); first += channels_) {
      for (int64_t c = 0; c < channels_; ++c) total[c] += sums_[first + c];
    }
    for (int64_t c = 0; c < channels_; ++c) output[c] = round_to<T>(total[c]);
  }

 private:
  int64_t channels_;
  std::vector<float> sums_;
};

}  // namespace fastconv
