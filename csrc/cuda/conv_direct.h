// Convolutions whose groups have few channels, without tensor cores: who is served so, and what their kernels share.
//
// The engine of tile.h multiplies tiles of 64 output channels or more, and every group gets tiles of its own: a pixel costs it
// 2 · 64 · C · taps operations for a group of C input channels, at about half of an H100's 989 TFLOP/s in bfloat16. By single
// multiply-adds it costs 2 · C · K · taps for K output channels, at 67 TFLOP/s: less where K < 64 · 67 / 495, a little below 9.
// The input gradient exchanges C and K. Where groups are small neither bound matters, but what is moved: of a depthwise 3×3 4
// bytes a pixel and channel, 1.2 ps at 3.35 TB/s. Its products take 0.3 ps here, and there 8 ps, as k comes in steps of 32.
#pragma once

#include "conv.h"
#include "pixels.h"

namespace fastconv {

constexpr int kMostDirectChannels = 8;
// A block keeps float32 weights of 8 channels or more in shared memory, of which GPUs grant 99 KiB at least.
constexpr int kMostDirectDepth = 2000;

// Whether direct kernels serve a convolution, forward and backward. Sizes alone decide, so that bits do not depend on a GPU.
template <class Params>
bool is_direct(const Params& p) {
  const int most = p.channels > p.out_channels ? p.channels : p.out_channels;
  const int64_t depth = static_cast<int64_t>(p.kernel_h) * p.kernel_w * most;
  return p.groups > 1 && most <= kMostDirectChannels && depth <= kMostDirectDepth;
}

void launch_direct(Stream stream, ScalarType dtype, Route route, const ConvParams& p);

// The weight gradient by partial sums of runs of pixels. `runs` first says how many rows p.sums must have.
int direct_weight_grad_runs(ScalarType dtype, const WeightGradParams& p);
void launch_direct_weight_grad(Stream stream, ScalarType dtype, const WeightGradParams& p);

constexpr int kDirectThreads = 256;

// Of a pixel's channels, a block takes `lanes` vectors, each thread one; `tiles` blocks take all. `lines` of lanes take
// different pixels, and threads behind the last whole line nothing.
struct Lanes {
  int lanes, tiles, lines;

  // As even as can be.
  static Lanes of(int64_t channels, int vector, int most) {
    const int64_t vectors = ceil_div(channels, vector), tiles = ceil_div(vectors, most);
    const int lanes = static_cast<int>(ceil_div(vectors, tiles));
    return {lanes, static_cast<int>(ceil_div(vectors, lanes)), kDirectThreads / lanes};
  }
  // Eight vectors of 16 bytes are a line of the cache, and a warp's four lines then share the weights that they read.
  static int most(int vector) { return vector == 1 ? 32 : 8; }
};

// body(vector, group): channels that a thread takes at once. Where groups have as many channels out as in, 1, 2, 4 or 8, they
// are 16 bytes or a whole group, whichever is more; where addresses do not allow it, and of other groups, one channel.
template <class T, class Body>
void by_group(int channels, int out_channels, int groups, std::initializer_list<const void*> addresses, const Body& body) {
  const auto try_group = [&](auto group) {
    constexpr int G = decltype(group)::value, V = G > kVectorOf<T> ? G : kVectorOf<T>;
    bool is_vector = channels == G && out_channels == G && G * groups % V == 0;
    for (const void* address : addresses) is_vector = is_vector && is_aligned(address);
    if (is_vector) body(std::integral_constant<int, V>{}, group);
    return is_vector;
  };
  if (try_group(std::integral_constant<int, 1>{}) || try_group(std::integral_constant<int, 2>{}) ||
      try_group(std::integral_constant<int, 4>{}) || try_group(std::integral_constant<int, 8>{})) {
    return;
  }
  body(std::integral_constant<int, 1>{}, std::integral_constant<int, 1>{});
}

// An element of a word of 32 bits.
template <class T>
FASTCONV_DEVICE float unpack(uint32_t word, int index);
template <>
FASTCONV_DEVICE float unpack<float>(uint32_t word, int) { return as_float(word); }
template <>
FASTCONV_DEVICE float unpack<bf16>(uint32_t word, int index) {
  return as_float(index == 0 ? word << 16 : word & 0xffff0000u);
}
template <>
FASTCONV_DEVICE float unpack<f16>(uint32_t word, int index) {
  return widen(f16{static_cast<uint16_t>(index == 0 ? word : word >> 16)});
}

// V neighbouring channels, one or some chunks of 16 bytes; or zeros, without a branch.
template <class T, int V>
FASTCONV_DEVICE void load_channels(float (&values)[V], const T* from, bool is_there) {
  if constexpr (V == 1) {
    T value{};
    if (is_there) value = load<T>(from);
    values[0] = widen(value);
  } else {
    constexpr int kPerWord = 4 / sizeof(T);
    FASTCONV_UNROLL
    for (int first = 0; first < V; first += 4 * kPerWord) {
      Words4 chunk{};
      if (is_there) chunk = load<Words4>(from + first);
      FASTCONV_UNROLL
      for (int i = 0; i < 4 * kPerWord; ++i) values[first + i] = unpack<T>(chunk.word[i / kPerWord], i % kPerWord);
    }
  }
}

template <class T, int V>
FASTCONV_DEVICE void store_channels(T* to, const float (&values)[V]) {
  if constexpr (V == 1) {
    store(to, narrow<T>(values[0]));
  } else {
    constexpr int kPerWord = 4 / sizeof(T);
    FASTCONV_UNROLL
    for (int first = 0; first < V; first += 4 * kPerWord) {
      Words4 chunk;
      FASTCONV_UNROLL
      for (int i = 0; i < 4; ++i) {
        if constexpr (sizeof(T) == 4) {
          chunk.word[i] = as_bits(values[first + i]);
        } else {
          chunk.word[i] = pack<T>(values[first + 2 * i], values[first + 2 * i + 1]);
        }
      }
      store(to + first, chunk);
    }
  }
}

// V neighbouring floats of shared memory.
template <int V>
FASTCONV_DEVICE void load_shared_floats(float (&values)[V], uint32_t address) {
  if constexpr (V == 1) {
    values[0] = load_shared<float>(address);
  } else {
    FASTCONV_UNROLL
    for (int first = 0; first < V; first += 4) {
      const Words4 chunk = load_shared<Words4>(address + first * 4);
      FASTCONV_UNROLL
      for (int i = 0; i < 4; ++i) values[first + i] = as_float(chunk.word[i]);
    }
  }
}

}  // namespace fastconv
