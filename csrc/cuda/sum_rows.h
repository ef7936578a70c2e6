// The second pass of a sum: rows of partial sums, added in order.
#pragma once

#include "launch.h"

namespace fastconv {

// output[s, i] = scale · Σ rows[s, r, i], in float32, rounded to T.
template <class T>
struct SumRowsParams {
  const float* rows;
  T* output;
  int64_t segments, columns;
  int count;
  float scale;
};

constexpr int kSumThreads = 128;

template <class T>
__global__ void sum_rows_kernel(const SumRowsParams<T> p) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kSumThreads + threadIdx.x;
  if (index >= p.segments * p.columns) return;
  const float* const first = p.rows + index / p.columns * p.count * p.columns + index % p.columns;
  float sum = 0.0f;
  for (int row = 0; row < p.count; ++row) sum += load<float>(first + row * p.columns);
  store(p.output + index, narrow<T>(sum * p.scale));
}

template <class T>
void sum_rows(
    Stream stream, const float* rows, int count, T* output, int64_t columns, int64_t segments = 1, float scale = 1.0f) {
  const SumRowsParams<T> p{rows, output, segments, columns, count, scale};
  launch(stream, sum_rows_kernel<T>, ceil_div(segments * columns, kSumThreads), kSumThreads, 0, p);
}

}  // namespace fastconv
