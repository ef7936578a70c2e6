// The arithmetic of instructions that a CPU does not have: conversions, and the collective operations of a warp.
#pragma once

#include "machine.h"

namespace emu {

inline float as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
inline uint32_t as_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float bf16_to_float(uint16_t half) { return as_float(static_cast<uint32_t>(half) << 16); }

inline uint16_t float_to_bf16(float value) {
  const uint32_t bits = as_bits(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float f16_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, magnitude = half & 0x7fff;
  if (magnitude >= 0x7c00) return as_float(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  return as_float(as_bits(as_float(magnitude << 13) * 0x1p112f) | sign);  // exact, subnormal halves included
}

inline uint16_t float_to_f16(float value) {
  const uint32_t bits = as_bits(value), magnitude = bits & 0x7fffffff;
  const uint16_t sign = bits >> 16 & 0x8000;
  if (magnitude > 0x7f800000) return 0x7fff;
  if (magnitude >= 0x477ff000) return sign | 0x7c00;  // from 65520 on
  if (magnitude < 0x38800000) return sign | static_cast<uint16_t>(as_bits(as_float(magnitude) + 0.5f) - as_bits(0.5f));
  return sign | static_cast<uint16_t>((magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13);
}

inline uint32_t round_to_tf32(uint32_t bits) {
  return (bits & 0x7f800000) == 0x7f800000 ? bits : (bits + 0x1000) & ~0x1fffu;
}

// Operands of products: elements of a word, and an element's value.
struct Bf16 {
  static constexpr int kPerWord = 2;
  static float value(uint32_t word, int element) { return bf16_to_float(static_cast<uint16_t>(word >> 16 * element)); }
};
struct F16 {
  static constexpr int kPerWord = 2;
  static float value(uint32_t word, int element) { return f16_to_float(static_cast<uint16_t>(word >> 16 * element)); }
};
struct Tf32 {
  static constexpr int kPerWord = 1;
  static float value(uint32_t word, int) { return as_float(word & ~0x1fffu); }  // the lower bits are not looked at
};

struct Product {
  float* d;
  const uint32_t* a;
  const uint32_t* b;
};

// mma.sync m16n8k16 and m16n8k8: fragments as PTX ISA draws them.
template <class T>
void multiply_warp(void** arguments, int) {
  constexpr int kPerWord = T::kPerWord, kDepth = 8 * kPerWord;
  float a[16][kDepth], b[kDepth][8];
  for (int lane = 0; lane < 32; ++lane) {
    const Product& product = *static_cast<Product*>(arguments[lane]);
    const int group = lane / 4, member = lane % 4;
    for (int e = 0; e < kPerWord; ++e) {
      for (int i = 0; i < 4; ++i) a[group + 8 * (i % 2)][member * kPerWord + e + kDepth / 2 * (i / 2)] = T::value(product.a[i], e);
      for (int i = 0; i < 2; ++i) b[member * kPerWord + e + kDepth / 2 * i][group] = T::value(product.b[i], e);
    }
  }
  for (int row = 0; row < 16; ++row) {
    float sums[8] = {};
    for (int k = 0; k < kDepth; ++k) {
      for (int column = 0; column < 8; ++column) sums[column] += a[row][k] * b[k][column];
    }
    for (int column = 0; column < 8; ++column) {
      const Product& owner = *static_cast<Product*>(arguments[row % 8 * 4 + column / 2]);
      owner.d[row / 8 * 2 + column % 2] += sums[column];
    }
  }
  ++counts().multiplications;
}

template <class T>
void multiply(float* d, const uint32_t* a, const uint32_t* b, int line) {
  Product product{d, a, b};
  together(WarpOp::kMultiply, &product, multiply_warp<T>, line);
}

struct MatrixLoad {
  uint32_t* words;
  uint32_t address;
};

// ldmatrix x4. Rows of a matrix whose 16 bytes lie in the same banks are read one after the other: a conflict.
template <bool kTransposed>
void load_matrices_warp(void** arguments, int line) {
  ++counts().matrix_loads;
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint16_t elements[8][8];
    unsigned banks = 0;
    for (int row = 0; row < 8; ++row) {
      const uint32_t address = static_cast<MatrixLoad*>(arguments[8 * matrix + row])->address;
      touch_shared_as_warp(address, 16, line);
      memcpy(elements[row], shared_bytes() + address, 16);
      banks |= 1u << address / 16 % 8;
    }
    counts().matrix_load_conflicts += banks != 0xff;
    for (int lane = 0; lane < 32; ++lane) {
      uint16_t pair[2];
      for (int e = 0; e < 2; ++e) {
        const int along = lane % 4 * 2 + e;
        pair[e] = kTransposed ? elements[along][lane / 4] : elements[lane / 4][along];
      }
      memcpy(&static_cast<MatrixLoad*>(arguments[lane])->words[matrix], pair, sizeof pair);
    }
  }
}

inline void load_matrices(uint32_t* words, uint32_t address, bool is_transposed, int line) {
  MatrixLoad load{words, address};
  together(WarpOp::kLoadMatrices, &load, is_transposed ? load_matrices_warp<true> : load_matrices_warp<false>, line);
}

struct Shuffle {
  uint32_t value, result;
  int mask;
};

inline void shuffle_warp(void** arguments, int) {
  for (int lane = 0; lane < 32; ++lane) {
    Shuffle& shuffle = *static_cast<Shuffle*>(arguments[lane]);
    shuffle.result = static_cast<Shuffle*>(arguments[lane ^ shuffle.mask])->value;
  }
}

inline uint32_t shuffle_xor(uint32_t value, int mask, int line) {
  Shuffle shuffle{value, 0, mask};
  together(WarpOp::kShuffle, &shuffle, shuffle_warp, line);
  return shuffle.result;
}

}  // namespace emu
