#include "conv_kernels.h"

namespace fastconv {

template void launch_conv<Tf32>(Stream, Route, ConvParams, bool, TileSize);
template void launch_weight_grad<Tf32>(Stream, WeightGradParams, bool, TileSize);
template int weight_grad_splits<Tf32>(WeightGradParams&, bool, TileSize);

}  // namespace fastconv
