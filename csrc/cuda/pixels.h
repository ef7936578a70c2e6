// Passes over the pixels of NHWC maps: who does what, and sums over pixels by channel.
//
// A block takes a run of pixels and up to `lanes` vectors of channels, its threads lie lanes × lines over them. Sums leave a row
// for each run, and sum_rows.h adds rows in order. How runs are cut depends on sizes and alignment alone: the same bits on every GPU.
#pragma once

#include "sum_rows.h"
#include "tensors.h"

#include <algorithm>
#include <type_traits>

namespace fastconv {

constexpr int kPassThreads = 256;

template <class T>
constexpr int kVectorOf = 16 / sizeof(T);

template <class T, int V>
struct alignas(sizeof(T) * V) Vector {
  T at[V];
};

template <class T, int V>
FASTCONV_DEVICE void load_values(float (&values)[V], const T* from) {
  const auto vector = load<Vector<T, V>>(from);
  FASTCONV_UNROLL
  for (int i = 0; i < V; ++i) values[i] = widen(vector.at[i]);
}

// Of what may be written in place.
template <class T, int V>
FASTCONV_DEVICE void load_own_values(float (&values)[V], const T* from) {
  const auto vector = load_own<Vector<T, V>>(from);
  FASTCONV_UNROLL
  for (int i = 0; i < V; ++i) values[i] = widen(vector.at[i]);
}

template <class T, int V>
FASTCONV_DEVICE void store_values(T* to, const float (&values)[V]) {
  Vector<T, V> vector;
  FASTCONV_UNROLL
  for (int i = 0; i < V; ++i) vector.at[i] = narrow<T>(values[i]);
  store(to, vector);
}

// Codes of max-pools.
template <class Code, int V>
FASTCONV_DEVICE void load_codes(int (&codes)[V], const Code* from) {
  if constexpr (sizeof(Code) == 1) {
    const auto vector = load<Vector<Code, V>>(from);
    FASTCONV_UNROLL
    for (int i = 0; i < V; ++i) codes[i] = vector.at[i];
  } else {
    FASTCONV_UNROLL
    for (int i = 0; i < V; ++i) codes[i] = load<Code>(from + i);
  }
}

template <class Code, int V>
FASTCONV_DEVICE void store_codes(Code* to, const int (&codes)[V]) {
  if constexpr (sizeof(Code) == 1) {
    Vector<Code, V> vector;
    FASTCONV_UNROLL
    for (int i = 0; i < V; ++i) vector.at[i] = static_cast<Code>(codes[i]);
    store(to, vector);
  } else {
    FASTCONV_UNROLL
    for (int i = 0; i < V; ++i) store(to + i, codes[i]);
  }
}

struct Runs {
  int pixels, run_pixels, runs;  // of a segment, which sums do not cross: an image, or all there is
  int segments, channels, lanes, tiles;

  int64_t blocks() const { return static_cast<int64_t>(segments) * runs * tiles; }
  int rows() const { return segments * runs; }

  // As many runs as keep a GPU busy, but of no fewer than a few pixels a thread.
  static Runs of(int64_t pixels, int64_t channels, int vector, int64_t segments = 1) {
    constexpr int64_t kWantedBlocks = 1024, kMostRuns = 512, kLeastPixels = 4;
    STD_TORCH_CHECK(
        pixels * segments < (int64_t{1} << 31) - (1 << 16) && channels < int64_t{1} << 30,
        "fastconv_native: a map of ", pixels * segments, " pixels and ", channels, " channels is too large");
    const int64_t vectors = ceil_div(channels, vector);
    int lanes = 1;
    while (lanes < vectors && lanes < 32) lanes *= 2;
    const int64_t tiles = ceil_div(vectors, lanes);
    int64_t runs = ceil_div(kWantedBlocks, tiles * std::max<int64_t>(segments, 1));
    runs = std::min({runs, kMostRuns, ceil_div(pixels, kPassThreads / lanes * kLeastPixels)});
    const int64_t run_pixels = runs == 0 ? 0 : ceil_div(pixels, runs);
    return {
        static_cast<int>(pixels), static_cast<int>(run_pixels), runs == 0 ? 0 : static_cast<int>(ceil_div(pixels, run_pixels)),
        static_cast<int>(segments), static_cast<int>(channels), lanes, static_cast<int>(tiles)};
  }
};

// The first channel of this thread's vector; from `channels` on there is nothing to do.
template <int V>
FASTCONV_DEVICE int channel_of(const Runs& runs) {
  return (blockIdx.x % runs.tiles * runs.lanes + threadIdx.x % runs.lanes) * V;
}

// body(pixel, sums) for each pixel of this thread, and rows[run, sum, channel] = Σ sums unless `rows` is null.
template <int kSums, int V, class Body>
FASTCONV_DEVICE void over_pixels(const Runs& runs, float* rows, const Body& body) {
  const int row = blockIdx.x / runs.tiles, tile = blockIdx.x % runs.tiles;
  const int line = threadIdx.x / runs.lanes, lines = kPassThreads / runs.lanes;
  const int start = row / runs.runs * runs.pixels, first = row % runs.runs * runs.run_pixels;
  const int last = first + runs.run_pixels < runs.pixels ? first + runs.run_pixels : runs.pixels;
  float sums[kSums][V];
  FASTCONV_UNROLL
  for (int k = 0; k < kSums; ++k) {
    FASTCONV_UNROLL
    for (int i = 0; i < V; ++i) sums[k][i] = 0.0f;
  }
  if (channel_of<V>(runs) < runs.channels) {
    for (int pixel = first + line; pixel < last; pixel += lines) body(start + pixel, sums);
  }
  if (rows == nullptr) return;
  constexpr int kBytes = kSums * V * 4;
  const uint32_t memory = shared_memory();
  FASTCONV_UNROLL
  for (int k = 0; k < kSums; ++k) {
    FASTCONV_UNROLL
    for (int i = 0; i < V; ++i) store_shared(memory + threadIdx.x * kBytes + (k * V + i) * 4, sums[k][i]);
  }
  block_barrier();
  for (int index = threadIdx.x; index < runs.lanes * kSums * V; index += kPassThreads) {
    const int channel = tile * runs.lanes * V + index % (runs.lanes * V), k = index / (runs.lanes * V);
    if (channel >= runs.channels) continue;
    const int lane = index % (runs.lanes * V) / V;
    float sum = 0.0f;
    for (int i = 0; i < lines; ++i) {
      sum += load_shared<float>(memory + (i * runs.lanes + lane) * kBytes + (k * V + index % V) * 4);
    }
    store(rows + (static_cast<int64_t>(row) * kSums + k) * runs.channels + channel, sum);
  }
}

template <int kSums, int V>
constexpr int kSumBytes = kPassThreads * kSums * V * 4;

// body(vector): the elements that a thread takes at once, where the channels and all `addresses` allow more than one.
template <class T, class Body>
void by_vector(int64_t channels, std::initializer_list<const void*> addresses, const Body& body) {
  bool is_vector = channels % kVectorOf<T> == 0;
  for (const void* address : addresses) is_vector = is_vector && is_aligned(address);
  if (is_vector) return body(std::integral_constant<int, kVectorOf<T>>{});
  body(std::integral_constant<int, 1>{});
}

}  // namespace fastconv
