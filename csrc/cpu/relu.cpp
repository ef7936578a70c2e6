// ReLU's backward with the bias gradient in the same pass, and the bias gradient alone.
#include "channel_sums.h"
#include "operators.h"

namespace fastconv {

namespace {

// `masked` may be `grad` itself.
template <class T>
FASTCONV_INLINE void mask(const T* grad, const T* output, T* masked, int64_t numel) {
  FASTCONV_VECTORIZE
  for (int64_t i = 0; i < numel; ++i) masked[i] = keep_if(!(load(output[i]) <= 0), grad[i]);
}

// run(sums, begin, end) over runs of pixels: short enough to stay in cache between two passes, and to keep float32 sums of
// large maps accurate. The total goes to `output`.
template <class T, class Run>
void sum_runs(const Map& map, T* output, const Run& run) {
  constexpr int64_t kRunElements = 8192;
  const int64_t step = std::max<int64_t>(1, kRunElements / map.channels);
  const Chunks pixels = Chunks::of(map.pixels(), map.channels, ChannelSums::kMostChunks);
  ChannelSums sums(pixels.count, map.channels);
  for_chunks(pixels.count, [&](int64_t first, int64_t last) FASTCONV_INLINE_LAMBDA {
    for (int64_t chunk = first; chunk < last; ++chunk) {
      const int64_t end = pixels.end(chunk);
      for (int64_t begin = pixels.begin(chunk); begin < end; begin += step) {
        run(sums.of_chunk(chunk), begin, std::min(end, begin + step));
      }
    }
  });
  sums.write_to(output);
}

template <class T>
FASTCONV_INLINE void add_run(float* sums, const T* values, int64_t pixels, int64_t channels) {
  add_to_channels(sums, pixels, channels, [=](int64_t i) FASTCONV_INLINE_LAMBDA { return load(values[i]); });
}

}  // namespace

void relu_backward(const Tensor& grad, const Tensor& output, const Tensor& masked, const std::optional<Tensor>& bias_grad) {
  const Map map = map_of(grad, "grad");
  check_same(output, "output", map, grad.scalar_type());
  check_same(masked, "masked", map, grad.scalar_type());
  check_bias(bias_grad, map, grad.scalar_type());
  const int64_t channels = map.channels;
  by_dtype(grad.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const T* const g = read<T>(grad);
    const T* const y = read<T>(output);
    T* const out = write<T>(masked);
    if (!bias_grad) {
      const Chunks chunks = Chunks::of(map.numel(), 1, map.numel());
      for_chunks(chunks.count, [=](int64_t first, int64_t last) FASTCONV_INLINE_LAMBDA {
        const int64_t begin = chunks.begin(first);
        mask(g + begin, y + begin, out + begin, chunks.end(last - 1) - begin);
      });
      return;
    }
    sum_runs(map, write<T>(*bias_grad), [=](float* sums, int64_t begin, int64_t end) FASTCONV_INLINE_LAMBDA {
      const int64_t first = begin * channels;
      mask(g + first, y + first, out + first, (end - begin) * channels);
      add_run(sums, out + first, end - begin, channels);
    });
  });
}

void bias_grad(const Tensor& grad, const Tensor& output) {
  const Map map = map_of(grad, "grad");
  check_bias(output, map, grad.scalar_type());
  const int64_t channels = map.channels;
  by_dtype(grad.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const T* const g = read<T>(grad);
    sum_runs(map, write<T>(output), [=](float* sums, int64_t begin, int64_t end) FASTCONV_INLINE_LAMBDA {
      add_run(sums, g + begin * channels, end - begin, channels);
    });
  });
}

}  // namespace fastconv
