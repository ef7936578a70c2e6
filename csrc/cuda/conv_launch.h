// Which kernels run a convolution: tiles by the size of the product, chunks of 16 bytes or of single elements.
#pragma once

#include "conv.h"
#include "conv_wgrad.h"
#include "launch.h"

namespace fastconv {

template <class Math>
using LargeTile = Shape<Math, 128, 128, 2, 4>;
template <class Math>
using SmallTile = Shape<Math, 128, 64, 2, 2>;
template <class Math>  // the weight gradient's rows are output channels
using TurnedTile = Shape<Math, 64, 128, 2, 2>;

enum class TileSize { kBySizes, kSmall, kLarge };

// A GPU of the kind has some hundred processors: fewer large tiles than these would leave half of them idle.
constexpr int64_t kEnoughBlocks = 96;

// `is_vector`: channels are multiples of 16 bytes, and so are addresses. Instantiated for each Math in a file of its own.
template <class Math>
void launch_conv(Stream stream, Route route, ConvParams p, bool is_vector, TileSize size);
template <class Math>
void launch_weight_grad(Stream stream, WeightGradParams p, bool is_vector, TileSize size);

// Into how many parts the sum over pixels is split: as many as keep a GPU busy, but of no fewer than eight steps. It depends on
// sizes and alignment alone, so that a weight gradient has the same bits on every GPU.
template <class Math>
int weight_grad_splits(WeightGradParams& p, bool is_vector, TileSize size);

}  // namespace fastconv
