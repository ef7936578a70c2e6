// The CUDA operators as CPU operators: the same sources, run by the machine of machine.cpp.
#include "cuda/operators.h"
#include "schemas.h"

#ifndef FASTCONV_NAMESPACE  // of torch.ops
#define FASTCONV_NAMESPACE fastconv_emulated
#endif

// The macros of torch would take the name of the macro for the namespace.
#define FASTCONV_LIBRARY(name, m) STABLE_TORCH_LIBRARY(name, m)
#define FASTCONV_IMPLEMENTATIONS(name, m) STABLE_TORCH_LIBRARY_IMPL(name, CPU, m)

FASTCONV_LIBRARY(FASTCONV_NAMESPACE, m) {
  fastconv::define_passes(m);
  fastconv::define_cuda_convolutions(m);
}

FASTCONV_IMPLEMENTATIONS(FASTCONV_NAMESPACE, m) {
  fastconv::implement_passes(m);
  fastconv::implement_cuda_convolutions(m);
}
