// Every PTX instruction and every memory access of the kernels: a device body and, for tests on a CPU, an emulated one.
//
// Sources: PTX ISA, "Warp-level matrix instructions" (layouts of fragments), "cp.async", "ldmatrix".
#pragma once

#include <cmath>
#include <cstdint>

#ifdef FASTCONV_EMULATED
#include "machine.h"
#include "soft.h"
#define FASTCONV_DEVICE inline
#define FASTCONV_UNROLL _Pragma("GCC unroll 1")
#define FASTCONV_LINE int line = __builtin_LINE()
#define FASTCONV_CALLER , FASTCONV_LINE
#define FASTCONV_BODY(device, ...) __VA_ARGS__
#else
#define FASTCONV_DEVICE __device__ __forceinline__
#define FASTCONV_UNROLL _Pragma("unroll")
#define FASTCONV_LINE
#define FASTCONV_CALLER
#define FASTCONV_BODY(device, ...) device
#endif

namespace fastconv {

// How elements are kept and multiplied.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

struct alignas(8) Words2 {
  uint32_t word[2];
};
struct alignas(16) Words4 {
  uint32_t word[4];
};

FASTCONV_DEVICE float as_float(uint32_t bits) { FASTCONV_BODY(return __uint_as_float(bits), return emu::as_float(bits)); }
FASTCONV_DEVICE uint32_t as_bits(float value) { FASTCONV_BODY(return __float_as_uint(value), return emu::as_bits(value)); }

// ---- conversions

FASTCONV_DEVICE float widen(float value) { return value; }
FASTCONV_DEVICE float widen(bf16 value) { return as_float(static_cast<uint32_t>(value.bits) << 16); }
FASTCONV_DEVICE float widen(f16 value) {
  FASTCONV_BODY(float wide; asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits)); return wide,
                return emu::f16_to_float(value.bits));
}

// Rounds to nearest, ties to even.
template <class T>
FASTCONV_DEVICE T narrow(float value);
template <>
FASTCONV_DEVICE float narrow<float>(float value) { return value; }
template <>
FASTCONV_DEVICE bf16 narrow<bf16>(float value) {
  FASTCONV_BODY(bf16 result; asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(value)); return result,
                return {emu::float_to_bf16(value)});
}
template <>
FASTCONV_DEVICE f16 narrow<f16>(float value) {
  FASTCONV_BODY(f16 result; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value)); return result,
                return {emu::float_to_f16(value)});
}

// Two elements in a word, the first in its lower half.
template <class T>
FASTCONV_DEVICE uint32_t pack(float first, float second);
template <>
FASTCONV_DEVICE uint32_t pack<bf16>(float first, float second) {
  FASTCONV_BODY(uint32_t word; asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first)); return word,
                return emu::float_to_bf16(first) | static_cast<uint32_t>(emu::float_to_bf16(second)) << 16);
}
template <>
FASTCONV_DEVICE uint32_t pack<f16>(float first, float second) {
  FASTCONV_BODY(uint32_t word; asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first)); return word,
                return emu::float_to_f16(first) | static_cast<uint32_t>(emu::float_to_f16(second)) << 16);
}

// To ten bits of mantissa, ties away from zero; the tensor core would cut off.
FASTCONV_DEVICE uint32_t round_to_tf32(uint32_t bits) {
  FASTCONV_BODY(uint32_t rounded; asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(as_float(bits))); return rounded,
                return emu::round_to_tf32(bits));
}

// ---- threads of a block

FASTCONV_DEVICE void block_barrier(FASTCONV_LINE) {
  FASTCONV_BODY(__syncthreads(), emu::block_barrier(line));
}

FASTCONV_DEVICE uint32_t shuffle_xor(uint32_t value, int mask FASTCONV_CALLER) {
  FASTCONV_BODY(return __shfl_xor_sync(0xffffffffu, value, mask), return emu::shuffle_xor(value, mask, line));
}

// ---- shared memory; addresses are those of the shared window, bytes

FASTCONV_DEVICE uint32_t shared_memory() {
  FASTCONV_BODY(extern __shared__ __align__(1024) unsigned char memory[];
                return static_cast<uint32_t>(__cvta_generic_to_shared(memory)), return 0);
}

template <class V>
FASTCONV_DEVICE V load_shared(uint32_t address FASTCONV_CALLER) {
  FASTCONV_BODY(return *static_cast<const V*>(__cvta_shared_to_generic(address)), return emu::load_shared<V>(address, line));
}

template <class V>
FASTCONV_DEVICE void store_shared(uint32_t address, V value FASTCONV_CALLER) {
  FASTCONV_BODY(*static_cast<V*>(__cvta_shared_to_generic(address)) = value, emu::store_shared(address, value, line));
}

// ---- global memory; `load` is for what no thread of the launch writes, `load_own` for what only this one does

#ifndef FASTCONV_EMULATED
// What as many bytes are loaded as.
template <int kBytes>
struct Bits;
template <>
struct Bits<1> {
  using Type = uint8_t;
};
template <>
struct Bits<2> {
  using Type = uint16_t;
};
template <>
struct Bits<4> {
  using Type = uint32_t;
};
template <>
struct Bits<8> {
  using Type = uint2;
};
template <>
struct Bits<16> {
  using Type = uint4;
};
#endif

template <class V>
FASTCONV_DEVICE V load(const void* address FASTCONV_CALLER) {
  FASTCONV_BODY(const auto bits = __ldg(static_cast<const typename Bits<sizeof(V)>::Type*>(address));
                return reinterpret_cast<const V&>(bits), return emu::load_global<V>(address, line));
}

template <class V>
FASTCONV_DEVICE V load_own(const void* address FASTCONV_CALLER) {
  FASTCONV_BODY(return *static_cast<const V*>(address), return emu::load_own<V>(address, line));
}

template <class V>
FASTCONV_DEVICE void store(void* address, V value FASTCONV_CALLER) {
  FASTCONV_BODY(*static_cast<V*>(address) = value, emu::store_global(address, value, line));
}

// ---- copies from global to shared memory that run beside the threads

// 16 bytes, or zeros where there is nothing to copy.
FASTCONV_DEVICE void copy_async(uint32_t shared, const void* global, bool is_there FASTCONV_CALLER) {
  FASTCONV_BODY(const int bytes = is_there ? 16 : 0;
                asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(bytes)
                             : "memory"),
                emu::copy_async(shared, global, is_there ? 16 : 0, line));
}
FASTCONV_DEVICE void copy_async_commit() {
  FASTCONV_BODY(asm volatile("cp.async.commit_group;" ::: "memory"), emu::copy_async_commit());
}
// Until all but the last kGroups groups of this thread's copies are there.
template <int kGroups>
FASTCONV_DEVICE void copy_async_wait() {
  FASTCONV_BODY(asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory"), emu::copy_async_wait(kGroups));
}

// ---- fragments of a warp

// Four 8×8 matrices of 16-bit elements (8×4 of 32-bit ones): lanes 8i … 8i + 7 hand over the addresses of matrix i's rows;
// lane l gets of matrix i, in words[i], elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4.
FASTCONV_DEVICE void load_matrices(uint32_t (&words)[4], uint32_t address FASTCONV_CALLER) {
  FASTCONV_BODY(asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                             : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                             : "r"(address)
                             : "memory"),
                emu::load_matrices(words, address, false, line));
}
// The same of the transposed matrices: rows 2 (l % 4) and 2 (l % 4) + 1 of column l / 4.
FASTCONV_DEVICE void load_matrices_transposed(uint32_t (&words)[4], uint32_t address FASTCONV_CALLER) {
  FASTCONV_BODY(asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                             : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                             : "r"(address)
                             : "memory"),
                emu::load_matrices(words, address, true, line));
}

// d[16, 8] += a[16, k] · b[k, 8], k of 32 bytes. Lane l = 4g + t holds d[g, 2t], d[g, 2t + 1], d[g + 8, 2t], d[g + 8, 2t + 1];
// of a, words of rows g, g + 8, g, g + 8, the last two from the latter half of k; of b, column g, likewise.
#define FASTCONV_MMA(NAME, T, SHAPE)                                                                                      \
  FASTCONV_DEVICE void NAME(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2] FASTCONV_CALLER) {              \
    FASTCONV_BODY(asm volatile("mma.sync.aligned." SHAPE " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
                               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                           \
                               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1])),                       \
                  emu::multiply<T>(d, a, b, line));                                                                       \
  }
FASTCONV_MMA(multiply_bf16, emu::Bf16, "m16n8k16.row.col.f32.bf16.bf16.f32")
FASTCONV_MMA(multiply_f16, emu::F16, "m16n8k16.row.col.f32.f16.f16.f32")
FASTCONV_MMA(multiply_tf32, emu::Tf32, "m16n8k8.row.col.f32.tf32.tf32.f32")
#undef FASTCONV_MMA

}  // namespace fastconv
