#include "conv_kernels.h"

namespace fastconv {

template void launch_conv<Ieee>(Stream, Route, ConvParams, bool, TileSize);
template void launch_weight_grad<Ieee>(Stream, WeightGradParams, bool, TileSize);
template int weight_grad_splits<Ieee>(WeightGradParams&, bool, TileSize);

}  // namespace fastconv
