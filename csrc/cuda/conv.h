// Convolution's forward and input gradient by the engine of tile.h, and what is done with the sums before they are stored.
#pragma once

#include "operands.h"

namespace fastconv {

enum class Route { kForward, kForwardPool, kInputGrad };

// A block's tile: of which group and phase, and from which row and column on.
struct Tile {
  int group, phase_h, phase_w, row, column;

  template <class S>
  static FASTCONV_DEVICE Tile of(const ConvParams& p) {
    // Blocks that share rows come one after the other: a map is larger than its weight.
    int block = blockIdx.x;
    const int across = block % p.tiles_across;
    block /= p.tiles_across;
    const int down = block % p.tiles_down;
    block /= p.tiles_down;
    const int group = block % p.groups, phase = block / p.groups;
    return {group, phase / p.stride_w, phase % p.stride_w, down * S::kRows, across * S::kColumns};
  }
};

// The pixels that rows of a product stand for.
template <Route kRoute>
struct Grid {
  int height, width, rows;  // rows: of all images

  FASTCONV_DEVICE Grid(const ConvParams& p, const Tile& tile) : height(p.out_height), width(p.out_width) {
    if constexpr (kRoute == Route::kForwardPool) {
      height /= 2;
      width /= 2;
    } else if constexpr (kRoute == Route::kInputGrad) {
      height = (height - tile.phase_h + p.stride_h - 1) / p.stride_h;
      width = (width - tile.phase_w + p.stride_w - 1) / p.stride_w;
    }
    rows = p.batch * height * width * (kRoute == Route::kForwardPool ? 4 : 1);
  }

  // Image, row and column of a row below `rows`; behind them, image −1. Four rows are a window, in reading order.
  FASTCONV_DEVICE void locate(int index, int& n, int& row, int& column) const {
    const bool is_there = index < rows;
    const int member = index % 4;
    if constexpr (kRoute == Route::kForwardPool) index /= 4;
    column = index % width;
    row = index / width % height;
    n = is_there ? index / width / height : -1;
    if constexpr (kRoute == Route::kForwardPool) {
      row = 2 * row + member / 2;
      column = 2 * column + member % 2;
    }
  }
};

template <class T, int kColumns>
struct Output {  // tiles on their way out, in shared memory: lines of T, padded so that lanes of a warp meet in no bank
  static constexpr int kVector = kChunkBytes / sizeof(T);
  static constexpr int kPitch = kColumns * static_cast<int>(sizeof(T)) + kChunkBytes;

  static FASTCONV_DEVICE void put(int row, int column, float first, float second) {
    const uint32_t address = shared_memory() + row * kPitch + column * static_cast<int>(sizeof(T));
    if constexpr (sizeof(T) == 2) {
      store_shared(address, pack<T>(first, second));
    } else {
      store_shared(address, Words2{{as_bits(first), as_bits(second)}});
    }
  }
};

// A chunk of shared memory to `to`, of which `count` elements are wanted; as a whole where `is_whole` (and aligned).
template <class E>
FASTCONV_DEVICE void store_chunk(E* to, uint32_t shared, int count, bool is_whole) {
  const Words4 chunk = load_shared<Words4>(shared);
  if (is_whole) {
    store(to, chunk);
    return;
  }
  constexpr int kPerWord = 4 / sizeof(E);
  FASTCONV_UNROLL
  for (int e = 0; e < 4 * kPerWord; ++e) {
    if (e >= count) continue;
    const uint32_t bits = chunk.word[e / kPerWord] >> (e % kPerWord * 8 * static_cast<int>(sizeof(E)));
    if constexpr (sizeof(E) == 4) store(reinterpret_cast<uint32_t*>(to + e), bits);
    if constexpr (sizeof(E) == 2) store(reinterpret_cast<uint16_t*>(to + e), static_cast<uint16_t>(bits));
    if constexpr (sizeof(E) == 1) store(reinterpret_cast<uint8_t*>(to + e), static_cast<uint8_t>(bits));
  }
}

template <class S, Route kRoute>
constexpr int shared_bytes() {
  constexpr int kRows = kRoute == Route::kForwardPool ? S::kRows / 4 : S::kRows;
  constexpr int kOutput = kRows * (Output<typename S::T, S::kColumns>::kPitch + (kRoute == Route::kForwardPool ? S::kColumns : 0));
  return kOutput > kStages * S::kStageBytes ? kOutput : kStages * S::kStageBytes;
}

// The biases of columns `column` and `column` + 1 of a tile.
template <class T>
FASTCONV_DEVICE void load_bias(float (&bias)[2], const ConvParams& p, int group, int column) {
  FASTCONV_UNROLL
  for (int e = 0; e < 2; ++e) {
    const bool is_there = p.bias != nullptr && column + e < p.out_channels;
    bias[e] = is_there ? widen(load<T>(static_cast<const T*>(p.bias) + group * p.out_channels + column + e)) : 0.0f;
  }
}

// y = relu(sums + bias + residual), rounded once.
template <class S, Route kRoute>
FASTCONV_DEVICE void finish(const Sums<S>& sums, const ConvParams& p, const Tile& tile, const Grid<kRoute>& grid) {
  using T = typename S::T;
  using Out = Output<T, S::kColumns>;
  const Lane lane = Lane::of<S>();
  const int pitch = p.out_channels * p.groups;
  const auto pixel_of = [&](int index) {
    if (kRoute == Route::kForward || (p.stride_h == 1 && p.stride_w == 1)) return static_cast<int64_t>(index);
    int n, row, column;
    grid.locate(index, n, row, column);
    row = tile.phase_h + row * p.stride_h;
    return (static_cast<int64_t>(n) * p.out_height + row) * p.out_width + tile.phase_w + column * p.stride_w;
  };
  FASTCONV_UNROLL
  for (int j = 0; j < S::kAcross; ++j) {
    const int column = lane.across + 8 * j + 2 * lane.member;
    float bias[2];
    load_bias<T>(bias, p, tile.group, tile.column + column);
    FASTCONV_UNROLL
    for (int i = 0; i < S::kDown; ++i) {
      FASTCONV_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int row = lane.down + 16 * i + 8 * half + lane.group;
        float value[2] = {sums[i][j][2 * half] + bias[0], sums[i][j][2 * half + 1] + bias[1]};
        if (kRoute == Route::kForward && p.residual != nullptr && tile.row + row < grid.rows) {
          const T* const residual = static_cast<const T*>(p.residual) + static_cast<int64_t>(tile.row + row) * pitch;
          FASTCONV_UNROLL
          for (int e = 0; e < 2; ++e) {
            const int channel = tile.column + column + e;
            if (channel < p.out_channels) value[e] += widen(load<T>(residual + tile.group * p.out_channels + channel));
          }
        }
        if (kRoute == Route::kForward && p.relu) {
          value[0] = relu(value[0]);
          value[1] = relu(value[1]);
        }
        Out::put(row, column, value[0], value[1]);
      }
    }
  }
  block_barrier();
  constexpr int kLineChunks = S::kColumns / Out::kVector;
  const bool is_whole = p.stores_chunks && p.out_channels % Out::kVector == 0;
  for (int index = threadIdx.x; index < S::kRows * kLineChunks; index += S::kThreads) {
    const int row = index / kLineChunks, column = index % kLineChunks * Out::kVector;
    const int count = p.out_channels - tile.column - column;
    if (tile.row + row >= grid.rows || count <= 0) continue;
    T* const to = static_cast<T*>(p.y) + pixel_of(tile.row + row) * pitch + tile.group * p.out_channels + tile.column + column;
    store_chunk(to, shared_memory() + row * Out::kPitch + column * static_cast<int>(sizeof(T)), count, is_whole);
  }
}

// y = relu(max of a window's sums + bias): bias and ReLU are monotone. The codes say which pixel won before the bias, which tells
// apart what an infinite bias makes equal, or that ReLU closed.
template <class S>
FASTCONV_DEVICE void finish_pool(const Sums<S>& sums, const ConvParams& p, const Tile& tile, const Grid<Route::kForwardPool>& grid) {
  using T = typename S::T;
  using Out = Output<T, S::kColumns>;
  constexpr int kWindows = S::kRows / 4;
  const uint32_t codes = shared_memory() + kWindows * Out::kPitch;
  const Lane lane = Lane::of<S>();
  FASTCONV_UNROLL
  for (int j = 0; j < S::kAcross; ++j) {
    const int column = lane.across + 8 * j + 2 * lane.member;
    float bias[2];
    load_bias<T>(bias, p, tile.group, tile.column + column);
    FASTCONV_UNROLL
    for (int i = 0; i < S::kDown; ++i) {
      FASTCONV_UNROLL
      for (int half = 0; half < 2; ++half) {
        float best[2];
        uint32_t code[2];
        FASTCONV_UNROLL
        for (int e = 0; e < 2; ++e) {
          best[e] = sums[i][j][2 * half + e];
          code[e] = 1 + lane.group % 4;
          FASTCONV_UNROLL
          // To the right, then down; lanes of neighbouring groups are 4 apart. What holds in the end is the first lane's value:
          // whatever it takes comes later.
          for (int bit = 1; bit <= 2; bit *= 2) {
            const float other = as_float(shuffle_xor(as_bits(best[e]), 4 * bit));
            const uint32_t other_code = shuffle_xor(code[e], 4 * bit);
            const bool takes_other = is_update(other, best[e]);
            best[e] = takes_other ? other : best[e];
            code[e] = takes_other ? other_code : code[e];
          }
          best[e] += bias[e];
          if (best[e] <= 0.0f) code[e] = 0;
          best[e] = relu(best[e]);
        }
        if (lane.group % 4 == 0) {
          const int window = (lane.down + 16 * i + 8 * half + lane.group) / 4;
          Out::put(window, column, best[0], best[1]);
          store_shared(codes + window * S::kColumns + column, static_cast<uint16_t>(code[0] | code[1] << 8));
        }
      }
    }
  }
  block_barrier();
  const int64_t pitch = static_cast<int64_t>(p.out_channels) * p.groups;
  const int first = tile.row / 4, windows = grid.rows / 4;
  const int channel = tile.group * p.out_channels + tile.column;
  const auto store_lines = [&](auto* to, uint32_t from, int line_bytes) {
    using E = std::remove_reference_t<decltype(*to)>;
    constexpr int kVector = kChunkBytes / sizeof(E), kLineChunks = S::kColumns / kVector;
    for (int index = threadIdx.x; index < kWindows * kLineChunks; index += S::kThreads) {
      const int window = index / kLineChunks, column = index % kLineChunks * kVector;
      const int count = p.out_channels - tile.column - column;
      if (first + window >= windows || count <= 0) continue;
      const uint32_t chunk = from + window * line_bytes + column * static_cast<int>(sizeof(E));
      const bool is_whole = p.stores_chunks && p.out_channels % kVector == 0;
      store_chunk(to + (first + window) * pitch + channel + column, chunk, count, is_whole);
    }
  };
  store_lines(static_cast<T*>(p.y), shared_memory(), Out::kPitch);
  store_lines(p.code, codes, S::kColumns);
}

template <class S, Route kRoute, bool kVector>
__global__ void __launch_bounds__(S::kThreads, kResident<S, kVector>) conv_kernel(const ConvParams p) {
  const Tile tile = Tile::of<S>(p);
  const Grid<kRoute> grid(p, tile);
  if (tile.row >= grid.rows) return;  // phases have as many blocks as the largest of them
  const auto locate = [&](int row, int& n, int& out_row, int& out_column) {
    grid.locate(tile.row + row, n, out_row, out_column);
  };
  Sums<S> sums;
  if constexpr (kRoute == Route::kInputGrad) {
    const Axis vertical = grad_axis(p.height, tile.phase_h, p.kernel_h, p.stride_h, p.pad_h, p.dilation_h);
    const Axis horizontal = grad_axis(p.width, tile.phase_w, p.kernel_w, p.stride_w, p.pad_w, p.dilation_w);
    Pixels<S, kVector> pixels(p, vertical, horizontal, tile.group, locate);
    WeightColumns<S, kVector> weight(p, vertical, horizontal, tile.group, tile.column);
    const int depth = vertical.taps * horizontal.taps * p.channels;
    multiply_tiles<S>(sums, pixels, weight, (depth + S::kDepth - 1) / S::kDepth);
  } else {
    const Axis vertical = forward_axis(p.height, p.kernel_h, p.stride_h, p.pad_h, p.dilation_h);
    const Axis horizontal = forward_axis(p.width, p.kernel_w, p.stride_w, p.pad_w, p.dilation_w);
    Pixels<S, kVector> pixels(p, vertical, horizontal, tile.group, locate);
    WeightRows<S, kVector> weight(p, tile.group, tile.column);
    const int depth = p.kernel_h * p.kernel_w * p.channels;
    multiply_tiles<S>(sums, pixels, weight, (depth + S::kDepth - 1) / S::kDepth);
  }
  if constexpr (kRoute == Route::kForwardPool) {
    finish_pool<S>(sums, p, tile, grid);
  } else {
    finish<S, kRoute>(sums, p, tile, grid);
  }
}

}  // namespace fastconv
