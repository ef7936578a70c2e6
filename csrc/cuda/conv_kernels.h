// Definitions of conv_launch.h, for the files that instantiate them.
#pragma once

#include "conv_launch.h"

namespace fastconv {

template <class S, Route kRoute, bool kVector>
void launch_tiles(Stream stream, ConvParams p) {
  int64_t height = p.out_height, width = p.out_width, phases = 1;
  if (kRoute == Route::kForwardPool) {
    height = height / 2 * 2;
    width = width / 2 * 2;
  } else if (kRoute == Route::kInputGrad) {
    height = ceil_div(height, p.stride_h);
    width = ceil_div(width, p.stride_w);
    phases = static_cast<int64_t>(p.stride_h) * p.stride_w;
  }
  const int64_t tiles_down = ceil_div(p.batch * height * width, S::kRows);
  p.tiles_down = static_cast<int>(tiles_down);
  p.tiles_across = static_cast<int>(ceil_div(p.out_channels, S::kColumns));
  const int64_t blocks = tiles_down * p.tiles_across * p.groups * phases;
  launch(stream, conv_kernel<S, kRoute, kVector>, blocks, S::kThreads, shared_bytes<S, kRoute>(), p);
}

template <class Math, Route kRoute>
void launch_route(Stream stream, const ConvParams& p, bool is_vector, TileSize size) {
  if (!is_vector) return launch_tiles<SmallTile<Math>, kRoute, false>(stream, p);
  if constexpr (!kIsIeee<Math>) {
    using Large = LargeTile<Math>;
    const int64_t pixels = static_cast<int64_t>(p.batch) * p.out_height * p.out_width;
    const int64_t blocks = ceil_div(pixels, Large::kRows) * ceil_div(p.out_channels, Large::kColumns) * p.groups;
    const bool pays = p.out_channels > SmallTile<Math>::kColumns && blocks >= kEnoughBlocks;
    if (size == TileSize::kLarge || (size == TileSize::kBySizes && pays)) return launch_tiles<Large, kRoute, true>(stream, p);
  }
  launch_tiles<SmallTile<Math>, kRoute, true>(stream, p);
}

template <class Math>
void launch_conv(Stream stream, Route route, ConvParams p, bool is_vector, TileSize size) {
  switch (route) {
    case Route::kForward:
      return launch_route<Math, Route::kForward>(stream, p, is_vector, size);
    case Route::kForwardPool:
      return launch_route<Math, Route::kForwardPool>(stream, p, is_vector, size);
    case Route::kInputGrad:
      return launch_route<Math, Route::kInputGrad>(stream, p, is_vector, size);
  }
}

constexpr int kLeastSteps = 8, kMostSplits = 512;
constexpr int64_t kWantedBlocks = 512;

template <class Math>
bool takes_large_tiles(const WeightGradParams& p, bool is_vector, TileSize size) {
  if (!is_vector || kIsIeee<Math>) return false;
  return size == TileSize::kBySizes ? p.out_channels > TurnedTile<Math>::kRows : size == TileSize::kLarge;
}

template <class S>
int split(WeightGradParams& p) {
  p.tiles_down = static_cast<int>(ceil_div(p.out_channels, S::kRows));
  p.tiles_across = static_cast<int>(ceil_div(static_cast<int64_t>(p.kernel_h) * p.kernel_w * p.channels, S::kColumns));
  const int64_t tiles = static_cast<int64_t>(p.tiles_down) * p.tiles_across * p.groups;
  const int64_t steps = ceil_div(static_cast<int64_t>(p.batch) * p.out_height * p.out_width, S::kDepth);
  if (steps == 0) return 0;
  int64_t splits = ceil_div(kWantedBlocks, tiles);
  if (splits > kMostSplits) splits = kMostSplits;
  if (splits > ceil_div(steps, kLeastSteps)) splits = ceil_div(steps, kLeastSteps);
  p.split_steps = static_cast<int>(ceil_div(steps, splits));
  return static_cast<int>(ceil_div(steps, p.split_steps));
}

template <class Math>
int weight_grad_splits(WeightGradParams& p, bool is_vector, TileSize size) {
  return takes_large_tiles<Math>(p, is_vector, size) ? split<LargeTile<Math>>(p) : split<TurnedTile<Math>>(p);
}

template <class S, bool kVector>
void launch_weight_grad_tiles(Stream stream, WeightGradParams p) {
  const int64_t blocks = static_cast<int64_t>(split<S>(p)) * p.tiles_down * p.tiles_across * p.groups;
  launch(stream, weight_grad_kernel<S, kVector>, blocks, S::kThreads, kStages * S::kStageBytes, p);
}

template <class Math>
void launch_weight_grad(Stream stream, WeightGradParams p, bool is_vector, TileSize size) {
  if (!is_vector) return launch_weight_grad_tiles<TurnedTile<Math>, false>(stream, p);
  if constexpr (!kIsIeee<Math>) {
    if (takes_large_tiles<Math>(p, is_vector, size)) return launch_weight_grad_tiles<LargeTile<Math>, true>(stream, p);
  }
  launch_weight_grad_tiles<TurnedTile<Math>, true>(stream, p);
}

}  // namespace fastconv
