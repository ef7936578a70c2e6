// bfloat16 3×3 convolutions of stride 1 on Intel's AMX: how they are cut into units of work, and what a unit does. See
// docs/cpu.md for drawings.
//
// amx.cpp shares units out; amx_kernels.cpp holds what they do, and alone is compiled for AMX.
#pragma once

#include "conv3x3.h"

// Whether the compiler knows AMX: those that do bring its header.
#if !defined(FASTCONV_AMX) && defined(__x86_64__) && defined(__linux__) && defined(__has_include)
#if __has_include(<amxbf16intrin.h>)
#define FASTCONV_AMX 1
#endif
#endif
#ifndef FASTCONV_AMX
#define FASTCONV_AMX 0
#endif

namespace fastconv::amx {

using Pass = Conv3x3Pass<BFloat16>;  // forward pass or input gradient
using WeightGrad = Conv3x3WeightGrad<BFloat16>;

constexpr int64_t kBlock = 32;       // a product's sums are [32, 32]: four tiles
constexpr int64_t kTilePixels = 16;  // rows of a tile
constexpr int64_t kTileElements = 512;
constexpr int64_t kBlockElements = 2 * kTileElements;  // 32 rows of a left factor, or 32 columns of a right one, of 32 products

constexpr int64_t blocks(int64_t count) { return ceil_div(count, kBlock); }

// Elements of the packed filter of a panel of 32 outputs: [9 taps, blocks of channels, 2 halves, 16 pairs, 16 outputs, 2].
inline int64_t packed_panel(const Conv3x3Sizes& s) { return 9 * blocks(s.channels) * kBlockElements; }

inline int64_t panels(const Conv3x3Sizes& s) { return blocks(s.out_channels); }

// Bands of rows of one image, copied with zeros around and channels filled up to whole blocks; from there tiles are read as
// they lie: 16 positions of the copy one after the other, whose rows are `pitch` positions. A band is worked on in strips
// whose sums stay in the first cache. Bands and strips begin at even rows: a window of a pool has one strip. Where bands are
// few, a unit has only a group of panels of one.
struct Bands {
  int64_t pitch, strip, rows, count, groups;  // rows of a strip and of a band; bands of an image

  static Bands of(const Pass& pass) {
    constexpr int64_t kSums = 256, kCopy = 1 << 18, kUnits = 32;  // positions of a strip, elements of a copy
    const Conv3x3Sizes& s = pass.sizes;
    const int64_t pitch = s.out_width + 2, height = used_rows(pass);
    if (s.batch * height == 0) return {};
    const int64_t fit = kSums / pitch / 2 * 2, strip = fit < 2 ? 2 : fit;
    const int64_t strips = ceil_div(height, strip), copied = strip * pitch * blocks(s.channels) * kBlock;
    const int64_t most = kCopy / copied, wanted = strips / ceil_div(kUnits, s.batch);  // strips of a band
    const int64_t smaller = most < wanted ? most : wanted, of_band = smaller < 1 ? 1 : smaller;
    const int64_t bands = ceil_div(strips, of_band), groups = ceil_div(kUnits, s.batch * bands);
    return {pitch, strip, of_band * strip, bands, groups < panels(s) ? groups : panels(s)};
  }

  // The output rows that anybody asks for: a pool may leave out the last.
  static int64_t used_rows(const Pass& pass) {
    const int64_t pooled = 2 * pass.output.pooled_height, height = pass.sizes.out_height;
    return pass.output.code != nullptr && pooled < height ? pooled : height;
  }

  int64_t copy(const Conv3x3Sizes& s) const {
    return ((rows + 2) * pitch + kTilePixels) * blocks(s.channels) * kBlock;
  }
  int64_t sums() const { return (strip * pitch + kTilePixels) * kBlock; }
};

// Chunks of pixels of a small map, each gathered with its 9 neighbours as [tiles, 9 taps, blocks of channels, 16 pixels, 32].
// Of a pooled map the four pixels of a window follow each other. Where chunks are few, a unit has only a group of panels.
struct Gathers {
  int64_t pixels, tiles, chunks, groups;  // of all; of a chunk

  static Gathers of(const Pass& pass) {
    constexpr int64_t kTiles = 8, kUnits = 8;
    const Conv3x3Sizes& s = pass.sizes;
    const int64_t pixels = pass.output.code == nullptr
                               ? s.batch * s.out_height * s.out_width
                               : 4 * s.batch * pass.output.pooled_height * pass.output.pooled_width;
    const int64_t tiles = ceil_div(pixels, kTilePixels), chunks = ceil_div(tiles, kTiles);
    if (chunks == 0) return {0, 0, 0, 1};
    const int64_t groups = ceil_div(kUnits, chunks), of_chunk = ceil_div(tiles, chunks);
    return {pixels, of_chunk, ceil_div(tiles, of_chunk), groups < panels(s) ? groups : panels(s)};
  }

  int64_t gathered(const Conv3x3Sizes& s) const { return tiles * 9 * blocks(s.channels) * kTileElements; }
  int64_t sums() const { return tiles * kTilePixels * kBlock; }
};

// A weight gradient as products of [32 output channels, 32 pixels] and [32 pixels, 32 input channels], for each tap: the
// gradient turned, [blocks of outputs, blocks of pixels, 2 halves, 16 outputs, 32 pixels], and the input in pairs of pixels,
// [halves of blocks of channels, pairs, 16 channels, 2], once for each tap.
struct Taps {
  int64_t pixels, chunk, part, parts;  // pixels of all and of a chunk; input channels of a unit

  static Taps of(const Conv3x3Sizes& s) {
    constexpr int64_t kChunk = 2048, kPart = 128;
    const int64_t pixels = s.batch * s.out_height * s.out_width, all = blocks(pixels) * kBlock;
    return {pixels, all < kChunk ? all : kChunk, kPart, ceil_div(s.channels, kPart)};
  }

  int64_t turned(const Conv3x3Sizes& s) const { return blocks(s.out_channels) * kBlock * chunk; }
  int64_t paired() const { return chunk * part; }
};

// The same products for a band of rows of an image with zeros around, whose rows are `pitch` positions: a tap is a shift.
// Pairs lie once from the first position on, once from the second, for odd shifts. A piece is a band; units sum runs of
// pieces, several of which are prepared before they are multiplied, into sums of their own.
struct Shifts {
  int64_t pitch, rows, bands, positions, pairs;  // of a piece: rows, output positions in blocks, pairs of input positions
  int64_t pieces, together, runs;

  static Shifts of(const Conv3x3Sizes& s) {
    constexpr int64_t kPrepared = 1 << 19, kPositions = 1024, kSums = 1 << 16, kLeast = 4, kMost = 16;
    const int64_t c = blocks(s.channels) * kBlock, k = blocks(s.out_channels) * kBlock, pitch = s.out_width + 2;
    const int64_t fit = kPrepared / (pitch * (2 * c + k)) - 2, rows = fit < 1 ? 1 : fit < s.out_height ? fit : s.out_height;
    const int64_t bands = ceil_div(s.out_height, rows), positions = blocks(rows * pitch - 2) * kBlock;
    const int64_t pieces = s.batch * bands, together = kPositions / positions < 1 ? 1 : kPositions / positions;
    const int64_t fixed = kSums / (c * k), wanted = fixed < kLeast ? kLeast : fixed < kMost ? fixed : kMost;
    return {pitch,  rows,     bands, positions, (positions + 2 * pitch + 2) / 2 + 1,
            pieces, together, pieces < wanted ? pieces : wanted};
  }

  int64_t turned(const Conv3x3Sizes& s) const { return blocks(s.out_channels) * kBlock * positions; }
  int64_t paired(const Conv3x3Sizes& s) const { return 2 * blocks(s.channels) * kBlock * 2 * pairs; }
};

// Floats of the sums of a weight gradient, [9 taps, output channels, input channels] in whole blocks.
inline int64_t gradient_sums(const Conv3x3Sizes& s) {
  return 9 * blocks(s.out_channels) * blocks(s.channels) * kBlock * kBlock;
}

void pack_filter(const Conv3x3Filter<BFloat16>& filter, int64_t panel, int64_t tap, BFloat16* packed);

void conv_band(const Pass& pass, const Bands& plan, int64_t unit, const BFloat16* filters, BFloat16* copy, float* sums);
void conv_gathered(const Pass& pass, const Gathers& plan, int64_t unit, const BFloat16* filters, BFloat16* left, float* sums);

// The block of 32 output channels, from pixel `first` of all on, `count` pixels of a chunk.
void turn_grad(const WeightGrad& pass, const Taps& plan, int64_t block, int64_t first, int64_t count, BFloat16* turned);
// A tap and a part of the input channels. `sums`: of all chunks, or null where there is one.
void add_tap(
    const WeightGrad& pass, const Taps& plan, int64_t unit, int64_t first, const BFloat16* turned, BFloat16* paired, float* sums);

void sum_run(const WeightGrad& pass, const Shifts& plan, int64_t run, BFloat16* turned, BFloat16* paired, float* sums);
// Output channel k from the sums of all runs.
void add_runs(const WeightGrad& pass, const Shifts& plan, int64_t k, const float* sums);

// Cut and shared among torch's threads.
void conv(const Pass& pass);
void weight_grad(const WeightGrad& pass);

}  // namespace fastconv::amx
