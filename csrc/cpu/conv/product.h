// The product at the heart of every algorithm: C[M, 2 vectors] (+)= A[M, K] · B[K, 2 vectors], C in registers.
//
//            kPanel = 2 · kWidth columns
//          ┌───────────────┐
//        K │ B: packed     │   two loads a step
//          └───────────────┘
//      K   ┌───────────────┐
//   ┌────┐ │ C: kRows rows │   2 · kRows sums in registers
// M │ A  │ │               │   of A one element a row and step, spread over a vector
//   └────┘ └───────────────┘
//
// A is read through two strides, so that weight gradients, whose A is a transposed map, need no copy.
#pragma once

#include "vec.h"

namespace fastconv::FASTCONV_ISA {

constexpr int kPanel = 2 * kWidth;
// Sums, two vectors of B and one of A fill the registers: 32 of AVX-512, 16 of AVX2 and SSE2.
constexpr int kRows = FASTCONV_VECTOR_BYTES == 64 ? 12 : 6;

// How factors lie in memory: as float32, multiplied one at a time,
struct Singles {
  using Element = float;  // of A
  static constexpr int kStep = 1;

  template <bool last>
  FASTCONV_INLINE static V spread(const float* a) {
    return splat(*a);
  }
  FASTCONV_INLINE static V multiply(V a, V b, V c) { return fma(a, b, c); }
  // Element `i` of K, of the vector of B that holds it.
  FASTCONV_INLINE static V part(V b, int64_t i) { return b; }
};

#if FASTCONV_PAIRS
// or as pairs of bfloat16, in both A and B: a lane holds two elements of K, whose products are added in float32. Subnormal
// factors and sums count as zero: the instruction has no other mode.
struct Pairs {
  using Element = BFloat16;
  static constexpr int kStep = 2;

  // What stands in A behind the last element of an odd number is not read: it need not be finite.
  template <bool last>
  FASTCONV_INLINE static V spread(const BFloat16* a) {
    uint32_t pair = 0;
    __builtin_memcpy(&pair, a, last ? 2 : 4);
    return (V)(VU{} + pair);
  }
  FASTCONV_INLINE static V multiply(V a, V b, V c) { return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b); }
  FASTCONV_INLINE static V part(V b, int64_t i) { return (V)(i % 2 == 0 ? (VU)b << 16 : (VU)b & 0xffff0000u); }
};
#endif

template <class Factors>
struct StridedOf {
  const typename Factors::Element* data;
  int64_t row, step;  // strides of M, and of K from step to step
};

using Strided = StridedOf<Singles>;

// K in `count` parts of `k` elements each, which lie so many elements apart in A and floats in B.
struct Parts {
  int64_t count, a, b;
};

template <int rows, class Factors>
FASTCONV_INLINE void product_rows(
    StridedOf<Factors> a, const float* b, int64_t b_stride, float* c, int64_t c_stride, int64_t k, bool add,
    Parts parts = {1, 0, 0}) {
  V left[rows], right[rows];
#pragma GCC unroll 12
  for (int i = 0; i < rows; ++i) {
    left[i] = add ? load(c + i * c_stride) : V{};
    right[i] = add ? load(c + i * c_stride + kWidth) : V{};
  }
  for (int64_t part = 0; part < parts.count; ++part) {
    const auto* a_step = a.data + part * parts.a;
    const float* b_step = b + part * parts.b;
    const auto step = [&](auto last) FASTCONV_INLINE_LAMBDA {
      const V b_left = load(b_step), b_right = load(b_step + kWidth);
#pragma GCC unroll 12
      for (int i = 0; i < rows; ++i) {
        const V spread = Factors::template spread<decltype(last)::value>(a_step + i * a.row);
        left[i] = Factors::multiply(spread, b_left, left[i]);
        right[i] = Factors::multiply(spread, b_right, right[i]);
      }
      a_step += a.step;
      b_step += b_stride;
    };
    for (int64_t steps = k / Factors::kStep; steps > 0; --steps) step(std::false_type{});
    if (k % Factors::kStep != 0) step(std::true_type{});
  }
#pragma GCC unroll 12
  for (int i = 0; i < rows; ++i) {
    store(c + i * c_stride, left[i]);
    store(c + i * c_stride + kWidth, right[i]);
  }
}

// Sums run over K in order whatever M is: how rows are grouped does not show in the result.
// Structures come by reference: copies on the stack are read wider than they were just written, which waits for all stores.
inline void product(
    const Strided& a, const float* b, int64_t b_stride, float* c, int64_t c_stride, int64_t m, int64_t k, bool add) {
  Strided rest{a.data, a.row, a.step};
  const auto rows = [&](auto count) FASTCONV_INLINE_LAMBDA {
    constexpr int n = decltype(count)::value;
    product_rows<n>(rest, b, b_stride, c, c_stride, k, add);
    rest.data += n * rest.row;
    c += n * c_stride;
    m -= n;
  };
  while (m >= kRows) rows(std::integral_constant<int, kRows>{});
  if constexpr (kRows > 8) {
    if (m >= 8) rows(std::integral_constant<int, 8>{});
  }
  if (m >= 4) rows(std::integral_constant<int, 4>{});
  if (m >= 2) rows(std::integral_constant<int, 2>{});
  if (m >= 1) rows(std::integral_constant<int, 1>{});
}

template <class Factors, int... counts>
FASTCONV_INLINE void product_of_rows(
    int64_t rows, const StridedOf<Factors>& a, const float* b, int64_t b_stride, float* c, int64_t c_stride, int64_t k, bool add,
    const Parts& parts, std::integer_sequence<int, counts...>) {
  ((rows == counts + 1 ? product_rows<counts + 1>(a, b, b_stride, c, c_stride, k, add, parts) : void()), ...);
}

// The product with K in parts, which the sums stay in registers for. Its rows are few: they are grouped as evenly as can be.
template <class Factors>
inline void product_in_parts(
    const StridedOf<Factors>& a, const float* b, int64_t b_stride, float* c, int64_t c_stride, int64_t m, int64_t k, bool add,
    const Parts& parts) {
  StridedOf<Factors> rest{a.data, a.row, a.step};
  for (int64_t groups = ceil_div(m, kRows); groups > 0; --groups) {
    const int64_t rows = ceil_div(m, groups);
    product_of_rows(rows, rest, b, b_stride, c, c_stride, k, add, parts, std::make_integer_sequence<int, kRows>{});
    rest.data += rows * rest.row;
    c += rows * c_stride;
    m -= rows;
  }
}

}  // namespace fastconv::FASTCONV_ISA
