// The kernels for every processor: vectors of 16 bytes, without fused multiply-adds.
#include "../scalar.h"

#define FASTCONV_ISA vec128
#define FASTCONV_VECTOR_BYTES 16
#include "kernels.inc"
