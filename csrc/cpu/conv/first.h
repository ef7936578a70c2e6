// What a first layer's convolution works on: images of few channels, where a kernel row is a short run of memory.
#pragma once

#include "output.h"

namespace fastconv {

// With a 2×2 pool, the output is what its windows see of it.
struct FirstSizes {
  int64_t batch, height, width, channels;
  int64_t out_height, out_width, out_channels;
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w;

  FASTCONV_INLINE int64_t run() const { return kernel_w * channels; }                // elements of a kernel row
  FASTCONV_INLINE int64_t taps() const { return kernel_h * run(); }                       // elements of a filter
  FASTCONV_INLINE int64_t padded() const { return (width + 2 * pad_w) * channels; }       // elements of a padded row of the image
  FASTCONV_INLINE int64_t rows_read(int64_t rows) const { return (rows - 1) * stride_h + kernel_h; }
};

// Output rows [row, row + rows) of an image.
struct Strip {
  int64_t image, row, rows;
};

template <class T>
struct FirstPass {
  FirstSizes sizes;
  const T* x;
  const float* filter;  // as FirstKernels has it
  bool finite;          // whether all weights are
  ConvOutput<T> output;
};

// The gradient of the output is `grad` where `output` is not closed by ReLU; with a code, the un-pooled `grad`.
template <class T>
struct FirstWeightGrad {
  FirstSizes sizes;
  const T* x;
  const T* grad;
  const T* output;      // or null: no ReLU
  const uint8_t* code;  // or null: no pool
  T* weight_grad;       // [K, KH, KW, C]
  T* bias_grad;         // or null
  int64_t pooled_height, pooled_width;
};

// The kernels of one instruction set for elements T. Memory is the caller's, as many floats as the functions here say.
template <class T>
struct FirstKernels {
  int64_t panel;    // output channels that are worked on together
  int64_t columns;  // of a forward's block of pixels
  int64_t step;     // elements of a kernel row in a lane of the packed filter: one float32, or two bfloat16

  int64_t panels(const FirstSizes& s) const { return ceil_div(s.out_channels, panel); }
  // Floats of a panel of the packed filter, [KH, elements of a kernel row / step, panel].
  int64_t packed(const FirstSizes& s) const { return s.kernel_h * ceil_div(s.run(), step) * panel; }
  int64_t forward_memory(const FirstSizes& s, int64_t rows) const { return s.rows_read(rows) * s.padded() + 2 * columns * panel; }
  int64_t grad_memory(const FirstSizes& s, int64_t rows, int64_t block) const {
    return s.rows_read(rows) * s.padded() + rows * block * panel;
  }

  // A strip of the output; with a pool, of an even row and, but at the end of an image, an even number of rows.
  void (*forward)(const FirstPass<T>&, Strip, float* memory);

  // sums [panels, taps + 1, panel] += a strip's share of the weight gradient, and of the bias gradient; `block` columns at a
  // time, an even number of them with a pool.
  void (*weight_grad)(const FirstWeightGrad<T>&, Strip, int64_t block, float* sums, float* memory);

  // The gradients of a panel from the sum of `count` such sets, `stride` floats apart, of taps [t0, t1); tap `taps` is the bias.
  void (*finish)(
      const FirstWeightGrad<T>&, int64_t panel, int64_t t0, int64_t t1, const float* sums, int64_t count, int64_t stride);
};

}  // namespace fastconv
