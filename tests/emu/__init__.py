"""The CUDA kernels of csrc/cuda, run on a CPU: as the C++ compiler compiles them, and as nvcc's PTX, translated."""
