// The CUDA operators as CPU operators of fastconv_emulated: the same sources, run by the machine of machine.cpp.
#include "cuda/operators.h"
#include "schemas.h"

#ifndef FASTCONV_NAMESPACE
#define FASTCONV_NAMESPACE fastconv_emulated
#endif
// Names are put together before they are expanded.
#define DEFINE(name, m) STABLE_TORCH_LIBRARY(name, m)
#define IMPLEMENT(name, m) STABLE_TORCH_LIBRARY_IMPL(name, CPU, m)

DEFINE(FASTCONV_NAMESPACE, m) {
  fastconv::define_passes(m);
  fastconv::define_cuda_convolutions(m);
}

IMPLEMENT(FASTCONV_NAMESPACE, m) {
  fastconv::implement_passes(m);
  fastconv::implement_cuda_convolutions(m);
}
