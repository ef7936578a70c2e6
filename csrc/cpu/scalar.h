// bfloat16 and float16 as bits, with conversions made of integer arithmetic and selects only: they vectorise on every
// instruction set, and give the same bits on each.
#pragma once

#include "inline.h"

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace fastconv {

struct BFloat16 {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

FASTCONV_INLINE uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

FASTCONV_INLINE float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

FASTCONV_INLINE float load(float value) { return value; }

FASTCONV_INLINE float load(BFloat16 value) { return float_of(static_cast<uint32_t>(value.bits) << 16); }

FASTCONV_INLINE float load(Half value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  const uint32_t normal = (magnitude << 13) + (112u << 23);
  const uint32_t special = (magnitude << 13) + (224u << 23);  // infinities and NaN
  // Subnormals are multiples of 2^-24: exact, and no float subnormal on the way.
  const uint32_t subnormal = bits_of(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
  const uint32_t wide = magnitude >= 0x7c00u ? special : normal;
  return float_of(sign | (magnitude < 0x0400u ? subnormal : wide));
}

// The nearest value of T, ties to even.
template <class T>
FASTCONV_INLINE T round_to(float value);

template <>
FASTCONV_INLINE float round_to<float>(float value) {
  return value;
}

template <>
FASTCONV_INLINE BFloat16 round_to<BFloat16>(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t quiet = (bits >> 16) | 0x0040u;
  return {static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded)};
}

template <>
FASTCONV_INLINE Half round_to<Half>(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude - (112u << 23) + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
  // Adding 0.5 leaves multiples of 2^-24, float16's subnormal step, in the low bits.
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  return {static_cast<uint16_t>(sign | (magnitude >= 0x47800000u ? special : finite))};
}

// For values that came from T: no rounding to do.
template <class T>
FASTCONV_INLINE T narrow(float value) {
  return round_to<T>(value);
}

template <>
FASTCONV_INLINE BFloat16 narrow<BFloat16>(float value) {
  return {static_cast<uint16_t>(bits_of(value) >> 16)};
}

// `value` where `keep`, else zero. Integers are masked, not chosen: the compiler would make branches of choices, which do
// not vectorise.
FASTCONV_INLINE float keep_if(bool keep, float value) { return keep ? value : 0.0f; }

template <class Integer>
FASTCONV_INLINE std::enable_if_t<std::is_integral_v<Integer>, Integer> keep_if(bool keep, Integer value) {
  return static_cast<Integer>(value & -static_cast<Integer>(keep));
}

template <class T>
FASTCONV_INLINE std::enable_if_t<!std::is_integral_v<T>, T> keep_if(bool keep, T value) {
  return {keep_if(keep, value.bits)};
}

}  // namespace fastconv
