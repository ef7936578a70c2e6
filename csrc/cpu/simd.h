// One source for every instruction set: a kernel is a callable whose body is always inlined, and `for_chunks` compiles it
// once per instruction set and picks one at run time. So binaries run everywhere and nothing depends on -march.
#pragma once

#include "inline.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#if defined(__x86_64__)
#define FASTCONV_TARGET_AVX2 __attribute__((target("avx2,fma,f16c,bmi,bmi2,lzcnt,movbe")))
#define FASTCONV_TARGET_AVX512 \
  __attribute__((target("avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2,lzcnt,movbe")))
#endif

namespace fastconv {

enum class InstructionSet { kDefault, kAvx2, kAvx512 };

// What this process runs; torch's own ATEN_CPU_CAPABILITY lowers it.
InstructionSet instruction_set();

// Whether it may use AVX-512's instructions for pairs of bfloat16: ATEN_CPU_CAPABILITY=avx512 asks for AVX-512 without.
bool multiplies_bfloat16();

template <class Body>
void run_default(const Body& body, int64_t begin, int64_t end) {
  body(begin, end);
}

#if defined(__x86_64__)
template <class Body>
FASTCONV_TARGET_AVX2 void run_avx2(const Body& body, int64_t begin, int64_t end) {
  body(begin, end);
}

template <class Body>
FASTCONV_TARGET_AVX512 void run_avx512(const Body& body, int64_t begin, int64_t end) {
  body(begin, end);
}
#endif

// body(begin, end) over parts of [0, chunks), in parallel. A chunk is worth a thread of its own.
template <class Body>
void for_chunks(int64_t chunks, const Body& body) {
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    switch (instruction_set()) {
#if defined(__x86_64__)
      case InstructionSet::kAvx512:
        return run_avx512(body, begin, end);
      case InstructionSet::kAvx2:
        return run_avx2(body, begin, end);
#endif
      default:
        return run_default(body, begin, end);
    }
  });
}

// Work in chunks that depend on sizes only, never on the number of threads: sums over chunks are reproducible.
struct Chunks {
  int64_t items;
  int64_t size;  // items in a chunk
  int64_t count;

  // `cost`: elements touched by one item. `most` bounds the count, and so the partial sums of a reduction.
  static Chunks of(int64_t items, int64_t cost, int64_t most) {
    constexpr int64_t kWorthAThread = 16384;
    const int64_t worth = kWorthAThread / std::max<int64_t>(cost, 1);
    const int64_t size = std::max({ceil_div(items, std::max<int64_t>(most, 1)), worth, int64_t{1}});
    return {items, size, ceil_div(items, size)};
  }

  int64_t begin(int64_t chunk) const { return chunk * size; }
  int64_t end(int64_t chunk) const { return std::min(items, (chunk + 1) * size); }
};

// Channels are worked on in blocks whose sums stay in registers or the nearest cache.
constexpr int64_t kBlock = 64;

// body(first, width) for each block; the width of a whole block, or of half of one, is a compile-time constant.
template <class Body>
FASTCONV_INLINE void for_blocks(int64_t channels, const Body& body) {
  constexpr int64_t kHalf = kBlock / 2;
  int64_t first = 0;
  for (; first + kBlock <= channels; first += kBlock) body(first, std::integral_constant<int64_t, kBlock>{});
  for (; first + kHalf <= channels; first += kHalf) body(first, std::integral_constant<int64_t, kHalf>{});
  if (first < channels) body(first, channels - first);
}

}  // namespace fastconv
