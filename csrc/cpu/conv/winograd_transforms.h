// The one-dimensional transforms of Winograd's F(4×4, 3×3), points 0, ±1, ±2, ∞; two-dimensional ones apply them to columns,
// then to rows. Y = Aᵀ[(G g Gᵀ) ⊙ (Bᵀ d B)]A of a filter g (3×3) and a tile d (6×6) of the input is a tile (4×4) of the
// output; the filter's gradient is Gᵀ[Σ (A y Aᵀ) ⊙ (Bᵀ d B)]G.
// Source: Lavin, Gray, "Fast Algorithms for Convolutional Neural Networks", 2016.
#pragma once

#include "vec.h"

namespace fastconv::FASTCONV_ISA {

constexpr int kTile = 4;          // outputs of a tile along one dimension
constexpr int kReach = 6;         // inputs of a tile along one dimension
constexpr int kPoints = 36;       // products of a tile

struct InputTransform {  // Bᵀ
  static constexpr int kFrom = 6, kTo = 6;

  template <int from, int to>
  FASTCONV_INLINE static void apply(const V* d, V* out) {
    const V d0 = d[0], d1 = d[from], d2 = d[2 * from], d3 = d[3 * from], d4 = d[4 * from], d5 = d[5 * from];
    const V even = fma(-4.0f, d2, d4), odd = fma(-4.0f, d1, d3);
    const V even2 = d4 - d2, odd2 = 2.0f * (d3 - d1);
    out[0] = fma(4.0f, d0, fma(-5.0f, d2, d4));
    out[to] = even + odd;
    out[2 * to] = even - odd;
    out[3 * to] = even2 + odd2;
    out[4 * to] = even2 - odd2;
    out[5 * to] = fma(4.0f, d1, fma(-5.0f, d3, d5));
  }
};

struct OutputTransform {  // Aᵀ
  static constexpr int kFrom = 6, kTo = 4;

  template <int from, int to>
  FASTCONV_INLINE static void apply(const V* m, V* out) {
    const V m1 = m[from], m2 = m[2 * from], m3 = m[3 * from], m4 = m[4 * from];
    const V sum = m1 + m2, difference = m1 - m2, sum2 = m3 + m4, difference2 = m3 - m4;
    out[0] = m[0] + (sum + sum2);
    out[to] = fma(2.0f, difference2, difference);
    out[2 * to] = fma(4.0f, sum2, sum);
    out[3 * to] = m[5 * from] + fma(8.0f, difference2, difference);
  }
};

struct FilterTransform {  // G
  static constexpr int kFrom = 3, kTo = 6;

  template <int from, int to>
  FASTCONV_INLINE static void apply(const V* g, V* out) {
    const V g0 = g[0], g1 = g[from], g2 = g[2 * from];
    const V even = (-1.0f / 6) * (g0 + g2), odd = (1.0f / 6) * g1;
    const V even2 = fma(1.0f / 24, g0, (1.0f / 6) * g2), odd2 = (1.0f / 12) * g1;
    out[0] = 0.25f * g0;
    out[to] = even - odd;
    out[2 * to] = even + odd;
    out[3 * to] = even2 + odd2;
    out[4 * to] = even2 - odd2;
    out[5 * to] = g2;
  }
};

struct GradTransform {  // A
  static constexpr int kFrom = 4, kTo = 6;

  template <int from, int to>
  FASTCONV_INLINE static void apply(const V* g, V* out) {
    const V g0 = g[0], g1 = g[from], g2 = g[2 * from], g3 = g[3 * from];
    const V even = g0 + g2, odd = g1 + g3, even2 = fma(4.0f, g2, g0), odd2 = fma(8.0f, g3, 2.0f * g1);
    out[0] = g0;
    out[to] = even + odd;
    out[2 * to] = even - odd;
    out[3 * to] = even2 + odd2;
    out[4 * to] = even2 - odd2;
    out[5 * to] = g3;
  }
};

struct FilterGradTransform {  // Gᵀ
  static constexpr int kFrom = 6, kTo = 3;

  template <int from, int to>
  FASTCONV_INLINE static void apply(const V* m, V* out) {
    const V sum = m[from] + m[2 * from], difference = m[2 * from] - m[from];
    const V sum2 = m[3 * from] + m[4 * from], difference2 = m[3 * from] - m[4 * from];
    out[0] = fma(0.25f, m[0], fma(-1.0f / 6, sum, (1.0f / 24) * sum2));
    out[to] = fma(1.0f / 6, difference, (1.0f / 12) * difference2);
    out[2 * to] = m[5 * from] + (1.0f / 6) * (sum2 - sum);
  }
};

// T M Tᵀ of the square M at `from`, row by row, into the square at `to`.
template <class T>
FASTCONV_INLINE void transform(const V* from, V* to) {
  V columns[T::kTo * T::kFrom];
#pragma GCC unroll 6
  for (int j = 0; j < T::kFrom; ++j) T::template apply<T::kFrom, T::kFrom>(from + j, columns + j);
#pragma GCC unroll 6
  for (int i = 0; i < T::kTo; ++i) T::template apply<1, 1>(columns + i * T::kFrom, to + i * T::kTo);
}

}  // namespace fastconv::FASTCONV_ISA
