#include "conv_kernels.h"

namespace fastconv {

template void launch_conv<F16>(Stream, Route, ConvParams, bool, TileSize);
template void launch_weight_grad<F16>(Stream, WeightGradParams, bool, TileSize);
template int weight_grad_splits<F16>(WeightGradParams&, bool, TileSize);

}  // namespace fastconv
