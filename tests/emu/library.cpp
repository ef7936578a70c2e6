// The CUDA operators as CPU operators of fastconv_emulated: the same sources, run by the machine of machine.cpp.
#include "cuda/operators.h"
#include "schemas.h"

STABLE_TORCH_LIBRARY(fastconv_emulated, m) {
  fastconv::define_passes(m);
  fastconv::define_cuda_convolutions(m);
}

STABLE_TORCH_LIBRARY_IMPL(fastconv_emulated, CPU, m) {
  fastconv::implement_passes(m);
  fastconv::implement_cuda_convolutions(m);
}
