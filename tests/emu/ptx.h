// What translated PTX (ptx.py) is written in: instructions that C++ has no operator for, by the PTX ISA.
#pragma once

#include "machine.h"
#include "soft.h"

#include <cmath>
#include <type_traits>

namespace ptx {

// A kernel's one parameter: too large for registers, so a call passes it as it does the kernel's own struct.
template <int kBytes>
struct Parameters {
  static_assert(kBytes > 16);
  alignas(8) uint8_t bytes[kBytes];
};

template <class V, int kBytes>
V parameter(const Parameters<kBytes>& parameters, uint64_t offset, int line) {
  if (offset + sizeof(V) > kBytes) emu::fail("read behind the parameters", line);
  V value;
  memcpy(&value, parameters.bytes + offset, sizeof value);
  return value;
}

template <class T, int kCount>
struct Vector {
  T at[kCount];
};

inline double as_double(uint64_t bits) {
  double value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
inline uint64_t as_bits(double value) {
  uint64_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

// ---- arithmetic

template <class T>
T divide(T a, T b, int line) {
  if (b == 0) emu::fail("division by zero", line);
  if constexpr (std::is_signed_v<T>) {
    if (b == -1) return -a;  // of the least integer, too, which traps on a CPU
  }
  return a / b;
}
template <class T>
T remainder(T a, T b, int line) {
  return a - divide(a, b, line) * b;
}

// Of a number and NaN, the number; −0 is less than +0.
inline float minimum(float a, float b) {
  if (a == b) return std::signbit(a) ? a : b;
  return a != a ? b : b != b ? a : a < b ? a : b;
}
inline float maximum(float a, float b) {
  if (a == b) return std::signbit(a) ? b : a;
  return a != a ? b : b != b ? a : a > b ? a : b;
}

// Shifts by more bits than there are shift all of them out.
template <class T>
T shift_left(T value, uint32_t bits) {
  return bits < 8 * sizeof(T) ? static_cast<T>(value << bits) : T{0};
}
template <class T>
T shift_right(T value, uint32_t bits) {
  return bits < 8 * sizeof(T) ? static_cast<T>(value >> bits) : static_cast<T>(value < 0 ? -1 : 0);
}

// shf: the words high:low shifted left (right) by bits modulo 32, its upper (lower) word.
inline uint32_t funnel_left(uint32_t low, uint32_t high, uint32_t bits) {
  return static_cast<uint32_t>(((static_cast<uint64_t>(high) << 32 | low) << bits % 32) >> 32);
}
inline uint32_t funnel_right(uint32_t low, uint32_t high, uint32_t bits) {
  return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) >> bits % 32);
}

// bfe, bfi: positions and lengths count to 255, a field ends with the word.
inline uint32_t extract_bits(uint32_t value, uint32_t position, uint32_t length) {
  return shift_right(value, position & 0xff) & ~shift_left(~0u, length & 0xff);
}
inline int32_t extract_bits(int32_t value, uint32_t position, uint32_t length) {
  position &= 0xff;
  length &= 0xff;
  if (length == 0) return 0;
  const uint32_t last = position + length - 1 < 31 ? position + length - 1 : 31;
  const bool is_negative = static_cast<uint32_t>(value) >> last & 1;
  const uint32_t field = extract_bits(static_cast<uint32_t>(value), position, length), bits = last + 1 - position;
  return static_cast<int32_t>(is_negative ? field | (position > 31 ? ~0u : shift_left(~0u, bits)) : field);
}
inline uint32_t insert_bits(uint32_t field, uint32_t into, uint32_t position, uint32_t length) {
  const uint32_t mask = shift_left(~shift_left(~0u, length & 0xff), position & 0xff);
  return (into & ~mask) | (shift_left(field, position & 0xff) & mask);
}

// prmt: each nibble of the selector names a byte of high:low, or, with its upper bit, that byte's sign eight times.
inline uint32_t permute(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t choice = selector >> 4 * i & 0xf, byte = bytes >> 8 * (choice & 7) & 0xff;
    result |= (choice & 8 ? (byte & 0x80 ? 0xffu : 0u) : byte) << 8 * i;
  }
  return result;
}

inline uint32_t pack_bf16(float upper, float lower) {
  return static_cast<uint32_t>(emu::float_to_bf16(upper)) << 16 | emu::float_to_bf16(lower);
}
inline uint32_t pack_f16(float upper, float lower) {
  return static_cast<uint32_t>(emu::float_to_f16(upper)) << 16 | emu::float_to_f16(lower);
}

// ---- the block

inline void barrier(uint32_t number, int line) {
  if (number != 0) emu::fail("a barrier other than the block's", line);
  emu::block_barrier(line);
}

inline uint32_t shuffle_xor(uint32_t value, uint32_t mask, uint32_t clamp, uint32_t members, int line) {
  if (mask > 31 || clamp != 31 || members != ~0u) emu::fail("a shuffle among fewer lanes than a warp's", line);
  return emu::shuffle_xor(value, static_cast<int>(mask), line);
}

inline void copy_async(uint32_t shared, uint64_t global, uint32_t size, uint32_t bytes, int line) {
  if (size != 16 || bytes > size) emu::fail("a copy of other than 16 bytes", line);
  emu::copy_async(shared, reinterpret_cast<const void*>(global), bytes, line);
}

}  // namespace ptx
