"""The CUDA kernels of csrc/cuda, compiled by the C++ compiler and run on a CPU."""
