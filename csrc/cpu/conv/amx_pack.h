// How AMX's right factors lie in memory: two reduction steps side by side in each 32 bits of a row.
#pragma once

#include "amx.h"
#include "amx_tiles.h"

namespace fastconv::FASTCONV_ISA {

typedef uint16_t Row __attribute__((vector_size(kTileBytes)));  // of a tile: 32 bfloat16

// `count` elements, 1 to 32 of them, the others zero.
FASTCONV_INLINE Row load_row(const BFloat16* p, int64_t count) {
  Row row;
  if (__builtin_expect(count == kBlock, 1)) {
    __builtin_memcpy(&row, p, sizeof(row));
    return row;
  }
  return (Row)_mm512_maskz_loadu_epi16(static_cast<__mmask32>((1u << count) - 1u), p);
}

FASTCONV_INLINE void store_row(BFloat16* p, Row row) { __builtin_memcpy(static_cast<void*>(p), &row, sizeof(row)); }

template <int... j>
FASTCONV_INLINE Row zip(Row a, Row b, int first, std::integer_sequence<int, j...>) {
  return first == 0 ? __builtin_shufflevector(a, b, (j / 2 + j % 2 * 32)...)
                    : __builtin_shufflevector(a, b, (16 + j / 2 + j % 2 * 32)...);
}

// Rows of two reduction steps as one row of pairs for columns 0 to 15, and one for columns 16 to 31.
FASTCONV_INLINE void pair_rows(Row a, Row b, Row& low, Row& high) {
  low = zip(a, b, 0, std::make_integer_sequence<int, 32>{});
  high = zip(a, b, 16, std::make_integer_sequence<int, 32>{});
}

// A square of 16 × 16 pairs changes rows for columns.
FASTCONV_INLINE void transpose_pairs(Row (&rows)[kTileRows]) {
  V lanes[kWidth];
  __builtin_memcpy(lanes, rows, sizeof(lanes));
  transpose(lanes);
  __builtin_memcpy(rows, lanes, sizeof(lanes));
}

// 32 rows of up to 32 channels, null ones zero, as 32 channels of 32 rows.
FASTCONV_INLINE void turn_rows(const BFloat16* const (&rows)[kBlock], int64_t count, BFloat16* to) {
  Row low[kTileRows], high[kTileRows];
  for (int i = 0; i < kTileRows; ++i) {
    const BFloat16 *const a = rows[2 * i], *const b = rows[2 * i + 1];
    pair_rows(a == nullptr ? Row{} : load_row(a, count), b == nullptr ? Row{} : load_row(b, count), low[i], high[i]);
  }
  transpose_pairs(low);
  transpose_pairs(high);
  for (int i = 0; i < kTileRows; ++i) {
    store_row(to + i * kBlock, low[i]);
    store_row(to + kTileElements + i * kBlock, high[i]);
  }
}

// The filter of one tap. Outputs are rows of memory and channels columns; where it is turned, the other way round.
void pack_filter(const Conv3x3Filter<BFloat16>& f, int64_t panel, int64_t tap, BFloat16* packed) {
  const int64_t first = panel * kBlock, channels = f.turned ? f.rows : f.columns;
  const int64_t outputs = least(kBlock, (f.turned ? f.columns : f.rows) - first);
  const BFloat16* const weight = f.weight + (f.turned ? 8 - tap : tap) * f.columns;
  for (int64_t c = 0; c < channels; c += kBlock, packed += kBlockElements) {
    const int64_t count = least(kBlock, channels - c);
    if (f.turned) {
      for (int64_t i = 0; i < kBlock; i += 2) {
        const auto row = [&](int64_t r) FASTCONV_INLINE_LAMBDA {
          return r < count ? load_row(weight + (c + r) * 9 * f.columns + first, outputs) : Row{};
        };
        Row low, high;
        pair_rows(row(i), row(i + 1), low, high);
        store_row(packed + i / 2 * kBlock, low);
        store_row(packed + kTileElements + i / 2 * kBlock, high);
      }
      continue;
    }
    for (int64_t half = 0; half < kBlock; half += kTileRows) {
      Row rows[kTileRows];
      for (int64_t i = 0; i < kTileRows; ++i) {
        rows[i] = half + i < outputs ? load_row(weight + (first + half + i) * 9 * f.columns + c, count) : Row{};
      }
      transpose_pairs(rows);
      for (int64_t i = 0; i < kTileRows; ++i) store_row(packed + half / kTileRows * kTileElements + i * kBlock, rows[i]);
    }
  }
}

}  // namespace fastconv::FASTCONV_ISA
