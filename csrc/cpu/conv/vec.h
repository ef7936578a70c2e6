// A vector of float32, and what kernels do with it; elements of memory are float, BFloat16 or Half.
//
// There is one source of kernels for every instruction set: kernels_<set>.cpp names a namespace (FASTCONV_ISA), the bytes of
// a vector (FASTCONV_VECTOR_BYTES) and the compiler's target, and includes the kernels. They call nothing of the standard
// library: a template of it, compiled for one instruction set, could be the copy that the linker keeps for all.
#pragma once

#include "../scalar.h"

#include <cstdint>
#include <utility>

namespace fastconv::FASTCONV_ISA {

constexpr int kWidth = FASTCONV_VECTOR_BYTES / 4;

typedef float V __attribute__((vector_size(FASTCONV_VECTOR_BYTES)));
typedef uint32_t VU __attribute__((vector_size(FASTCONV_VECTOR_BYTES)));
typedef int32_t VI __attribute__((vector_size(FASTCONV_VECTOR_BYTES)));
typedef uint16_t VH __attribute__((vector_size(FASTCONV_VECTOR_BYTES / 2)));
typedef uint8_t VB __attribute__((vector_size(FASTCONV_VECTOR_BYTES / 4)));

template <class T>
using Lanes = std::conditional_t<sizeof(T) == 4, V, VH>;  // kWidth elements as they lie in memory

FASTCONV_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
FASTCONV_INLINE int64_t most(int64_t a, int64_t b) { return a < b ? b : a; }

FASTCONV_INLINE V splat(float value) { return value - V{}; }

FASTCONV_INLINE V fma(V a, V b, V c) {
#if FASTCONV_VECTOR_BYTES == 64
  return _mm512_fmadd_ps(a, b, c);
#elif FASTCONV_VECTOR_BYTES == 32
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

FASTCONV_INLINE V fma(float a, V b, V c) { return fma(splat(a), b, c); }

FASTCONV_INLINE bool any_nan(V v) {
#if FASTCONV_VECTOR_BYTES == 64
  return _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q) != 0;
#elif FASTCONV_VECTOR_BYTES == 32
  return _mm256_movemask_ps(_mm256_cmp_ps(v, v, _CMP_UNORD_Q)) != 0;
#else
  bool any = false;
  for (int i = 0; i < kWidth; ++i) any |= v[i] != v[i];
  return any;
#endif
}

// torch's ReLU: NaN stays.
FASTCONV_INLINE V relu(V v) { return v < 0 ? V{} : v; }

template <class T>
FASTCONV_INLINE V widen(Lanes<T> lanes) {
  if constexpr (std::is_same_v<T, float>) {
    return lanes;
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    return (V)(__builtin_convertvector(lanes, VU) << 16);
  } else {
#if FASTCONV_VECTOR_BYTES == 64
    return _mm512_cvtph_ps((__m256i)lanes);
#elif FASTCONV_VECTOR_BYTES == 32
    return _mm256_cvtph_ps((__m128i)lanes);
#else
    V v;
    for (int i = 0; i < kWidth; ++i) v[i] = fastconv::load(Half{lanes[i]});
    return v;
#endif
  }
}

// The nearest values of T, ties to even.
template <class T>
FASTCONV_INLINE Lanes<T> narrow(V v) {
  if constexpr (std::is_same_v<T, float>) {
    return v;
  } else if constexpr (std::is_same_v<T, BFloat16>) {
#if FASTCONV_PAIRS
    return (VH)_mm512_cvtneps_pbh(v);  // subnormal values become zero
#else
    const VU bits = (VU)v;
    const VU rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const VU quiet = (bits >> 16) | 0x0040u;
    return __builtin_convertvector((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded, VH);
#endif
  } else {
#if FASTCONV_VECTOR_BYTES == 64
    return (VH)_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif FASTCONV_VECTOR_BYTES == 32
    return (VH)_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
#else
    VH lanes;
    for (int i = 0; i < kWidth; ++i) lanes[i] = round_to<Half>(v[i]).bits;
    return lanes;
#endif
  }
}

// kWidth elements at any alignment.
template <class T>
FASTCONV_INLINE V load(const T* p) {
  Lanes<T> lanes;
  __builtin_memcpy(&lanes, p, sizeof(lanes));
  return widen<T>(lanes);
}

template <class T>
FASTCONV_INLINE void store(T* p, V v) {
  const Lanes<T> lanes = narrow<T>(v);
  __builtin_memcpy(static_cast<void*>(p), &lanes, sizeof(lanes));
}

// The first `count` elements, 1 to kWidth of them: the rest of memory is not touched, the other lanes are zero.
template <class T>
FASTCONV_INLINE V load(const T* p, int64_t count) {
  if (__builtin_expect(count == kWidth, 1)) return load(p);
#if FASTCONV_VECTOR_BYTES == 64
  const __mmask16 mask = static_cast<__mmask16>((1u << count) - 1u);
  if constexpr (sizeof(T) == 4) {
    return _mm512_maskz_loadu_ps(mask, p);
  } else {
    return widen<T>((VH)_mm256_maskz_loadu_epi16(mask, p));
  }
#else
  T lanes[kWidth] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i] = p[i];
  return load(lanes);
#endif
}

template <class T>
FASTCONV_INLINE void store(T* p, V v, int64_t count) {
  if (__builtin_expect(count == kWidth, 1)) return store(p, v);
#if FASTCONV_VECTOR_BYTES == 64
  const __mmask16 mask = static_cast<__mmask16>((1u << count) - 1u);
  if constexpr (sizeof(T) == 4) {
    _mm512_mask_storeu_ps(p, mask, v);
  } else {
    _mm256_mask_storeu_epi16(p, mask, (__m256i)narrow<T>(v));
  }
#else
  T lanes[kWidth];
  store(lanes, v);
  for (int64_t i = 0; i < count; ++i) p[i] = lanes[i];
#endif
}

FASTCONV_INLINE void store_codes(uint8_t* p, VI codes, int64_t count) {
  const VB narrow = __builtin_convertvector(codes, VB);
  if (__builtin_expect(count == kWidth, 1)) {
    __builtin_memcpy(p, &narrow, sizeof(narrow));
    return;
  }
  for (int64_t i = 0; i < count; ++i) p[i] = narrow[i];
}

// One step of a transposition: of two rows `step` apart, the blocks of `step` lanes off the diagonal change places.
template <int step, int... j>
FASTCONV_INLINE void exchange(V& a, V& b, std::integer_sequence<int, j...>) {
  const V upper = __builtin_shufflevector(a, b, ((j & step) ? kWidth + j - step : j)...);
  b = __builtin_shufflevector(a, b, ((j & step) ? kWidth + j : j + step)...);
  a = upper;
}

// rows[i][j] and rows[j][i] change places.
template <int step = kWidth / 2>
FASTCONV_INLINE void transpose(V (&rows)[kWidth]) {
#pragma GCC unroll 16
  for (int i = 0; i < kWidth; ++i) {
    if ((i & step) == 0) exchange<step>(rows[i], rows[i + step], std::make_integer_sequence<int, kWidth>{});
  }
  if constexpr (step > 1) transpose<step / 2>(rows);
}

}  // namespace fastconv::FASTCONV_ISA
