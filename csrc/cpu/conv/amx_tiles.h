// Intel's AMX: eight tile registers of 16 rows of 64 bytes, and products of bfloat16 tiles. Every tile instruction of the
// library is in this file.
//
// FASTCONV_AMX_EMULATED replaces them by the same arithmetic on ordinary memory, which checks how it is used and aborts where
// the processor would fault or give something else: so tests run where there is no AMX.
//
// Written as assembler and not with the compiler's intrinsics: those of gcc 12 take tile numbers as text only, do not say
// that they read memory, and let all but 8 of a configuration's 64 bytes be optimised away.
#pragma once

#include "vec.h"

#if defined(FASTCONV_AMX_EMULATED)
#include <cstdio>
#include <cstdlib>
#endif

namespace fastconv::FASTCONV_ISA {

constexpr int kTiles = 8;
constexpr int kTileRows = 16;
constexpr int kTileBytes = 64;  // of a row: 32 bfloat16, or 16 floats

// The operand of LDTILECFG: palette 1, every tile whole.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {kTileBytes, kTileBytes, kTileBytes, kTileBytes, kTileBytes, kTileBytes, kTileBytes, kTileBytes};
  uint8_t rows[16] = {kTileRows, kTileRows, kTileRows, kTileRows, kTileRows, kTileRows, kTileRows, kTileRows};
};
static_assert(sizeof(TileConfig) == 64);
inline constexpr TileConfig kWholeTiles;

#if !defined(FASTCONV_AMX_EMULATED)

inline void configure_tiles(const TileConfig& config) { asm volatile("ldtilecfg %0" ::"m"(config)); }

inline void release_tiles() { asm volatile("tilerelease"); }

template <int tile>
FASTCONV_INLINE void zero_tile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(tile));
}

// 16 rows of 64 bytes, `stride` bytes apart.
template <int tile>
FASTCONV_INLINE void load_tile(const void* rows, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(rows), "r"(stride), "i"(tile) : "memory");
}

template <int tile>
FASTCONV_INLINE void store_tile(void* rows, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(rows), "r"(stride), "i"(tile) : "memory");
}

// to[m][n] += Σ over pairs p: a[m][2p] · b[p][2n] + a[m][2p + 1] · b[p][2n + 1]; subnormal operands and results are zero.
template <int to, int a, int b>
FASTCONV_INLINE void multiply_tiles() {
  static_assert(to != a && to != b && a != b, "the processor refuses equal operands");
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(to), "i"(a), "i"(b));
}

// The nearest bfloat16, ties to even; subnormals become zero.
FASTCONV_INLINE VH to_bfloat16(V v) { return (VH)_mm512_cvtneps_pbh(v); }

#else

struct EmulatedTiles {
  bool configured = false;
  TileConfig config;
  alignas(64) uint8_t data[kTiles][kTileRows][kTileBytes];
};
inline thread_local EmulatedTiles emulated;

inline void expect(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "emulated AMX: %s\n", what);
  std::abort();
}

inline void configure_tiles(const TileConfig& config) {
  expect(!emulated.configured, "tiles are configured twice");
  expect(config.palette == 1 && config.start_row == 0, "the configuration's palette must be 1, its start row 0");
  for (const uint8_t byte : config.reserved) expect(byte == 0, "a reserved byte of the configuration is not 0");
  for (int tile = 0; tile < 16; ++tile) {
    expect(config.rows[tile] <= kTileRows && config.row_bytes[tile] <= kTileBytes, "a tile has too many rows or columns");
    expect((config.rows[tile] == 0) == (config.row_bytes[tile] == 0), "a tile has rows without columns, or columns without rows");
    expect(tile < kTiles || config.rows[tile] == 0, "the configuration has more than 8 tiles");
  }
  emulated.config = config;
  emulated.configured = true;
  __builtin_memset(emulated.data, 0, sizeof(emulated.data));
}

inline void release_tiles() { emulated.configured = false; }

template <int tile>
inline void expect_tile() {
  static_assert(tile >= 0 && tile < kTiles);
  expect(emulated.configured, "a tile is used before the tiles are configured, or after they were released");
  expect(emulated.config.rows[tile] > 0, "a tile is used that the configuration leaves out");
}

template <int tile>
inline void zero_tile() {
  expect_tile<tile>();
  __builtin_memset(emulated.data[tile], 0, sizeof(emulated.data[tile]));
}

template <int tile>
inline void load_tile(const void* rows, int64_t stride) {
  zero_tile<tile>();
  for (int i = 0; i < emulated.config.rows[tile]; ++i) {
    __builtin_memcpy(emulated.data[tile][i], static_cast<const uint8_t*>(rows) + i * stride, emulated.config.row_bytes[tile]);
  }
}

template <int tile>
inline void store_tile(void* rows, int64_t stride) {
  expect_tile<tile>();
  for (int i = 0; i < emulated.config.rows[tile]; ++i) {
    __builtin_memcpy(static_cast<uint8_t*>(rows) + i * stride, emulated.data[tile][i], emulated.config.row_bytes[tile]);
  }
}

// Work on emulated tiles as AMX does it: subnormal operands and results are zero, whatever the caller has set.
template <class Body>
inline void with_subnormals_zero(const Body& body) {
  const unsigned caller = _mm_getcsr();
  _mm_setcsr(0x9fc0);  // round to nearest even, exceptions masked, denormals-are-zero, flush-to-zero
  asm volatile("" ::: "memory");
  body();
  asm volatile("" ::: "memory");
  _mm_setcsr(caller);
}

template <int to, int a, int b>
inline void multiply_tiles() {
  static_assert(to != a && to != b && a != b, "the processor refuses equal operands");
  expect_tile<to>();
  expect_tile<a>();
  expect_tile<b>();
  const TileConfig& config = emulated.config;
  expect(
      config.rows[to] == config.rows[a] && config.row_bytes[to] == config.row_bytes[b] &&
          config.row_bytes[a] == 4 * config.rows[b] && config.row_bytes[to] % 4 == 0,
      "the tiles of a product do not fit");
  with_subnormals_zero([&] {
    for (int m = 0; m < config.rows[to]; ++m) {
      V even{}, odd{}, sum;  // two sums of their own, as the processor has them
      for (int p = 0; p < config.rows[b]; ++p) {
        uint32_t pair;
        VU pairs;
        __builtin_memcpy(&pair, emulated.data[a][m] + 4 * p, sizeof(pair));
        __builtin_memcpy(&pairs, emulated.data[b][p], sizeof(pairs));
        even = fma(splat(float_of(pair << 16)), (V)(pairs << 16), even);
        odd = fma(splat(float_of(pair & 0xffff0000u)), (V)(pairs & 0xffff0000u), odd);
      }
      __builtin_memcpy(&sum, emulated.data[to][m], sizeof(sum));
      sum = sum + (even + odd);
      __builtin_memcpy(emulated.data[to][m], &sum, sizeof(sum));
    }
  });
}

FASTCONV_INLINE VH to_bfloat16(V v) {
  const VI subnormal = ((VU)v & 0x7f800000u) == 0;
  return narrow<BFloat16>((V)((VU)v & ~((VU)subnormal & 0x7fffffffu)));
}

#endif

// Tiles for a thread's use until the end of the scope.
class TilesInUse {
 public:
  TilesInUse() { configure_tiles(kWholeTiles); }
  ~TilesInUse() { release_tiles(); }
  TilesInUse(const TilesInUse&) = delete;
  TilesInUse& operator=(const TilesInUse&) = delete;
};

}  // namespace fastconv::FASTCONV_ISA
