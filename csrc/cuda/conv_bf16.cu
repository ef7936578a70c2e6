#include "conv_kernels.h"

namespace fastconv {

template void launch_conv<Bf16>(Stream, Route, ConvParams, bool, TileSize);
template void launch_weight_grad<Bf16>(Stream, WeightGradParams, bool, TileSize);
template int weight_grad_splits<Bf16>(WeightGradParams&, bool, TileSize);

}  // namespace fastconv
