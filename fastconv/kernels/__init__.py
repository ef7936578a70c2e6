"""Triton kernels: `@triton.jit` functions only. They are launched by fastconv.backends.triton.

Every map lies NHWC in memory and dense, every weight [O, KH, KW, C / groups]. A pixel is numbered through (n, row,
column) in 32 bits; offsets of elements are 64 bits wide. Names: `*_ptr` for a tensor, `BLOCK_*` for a tile's side.
"""
