// What kernels do with single values.
#pragma once

#include "device.h"

namespace fastconv {

// Whether a max-pool takes a value that comes later in reading order: NaN wins over all before it, as in torch.
FASTCONV_DEVICE bool is_update(float later, float earlier) { return later > earlier || later != later; }

// NaN stays NaN.
FASTCONV_DEVICE float relu(float value) { return value < 0.0f ? 0.0f : value; }

FASTCONV_DEVICE bool is_inside(int position, int size) { return static_cast<unsigned>(position) < static_cast<unsigned>(size); }

}  // namespace fastconv
