// Max-pooling of NHWC maps, optionally with ReLU. What backward needs of it is a code for each window: 0 where ReLU closed
// it, else 1 + row * KW + column of the winner.
#include "operators.h"
#include "windows.h"

#include <limits>
#include <type_traits>

namespace fastconv {

namespace {

// How values of T compare, in lanes of T's own width: NaN above everything, zeros equal. Windows work on plain Bits and
// not on T, whose copies under a condition would not vectorise.
template <class T>
struct Order;

template <>
struct Order<float> {
  using Bits = float;
  using Index = int32_t;

  static float lowest() { return -std::numeric_limits<float>::infinity(); }
  FASTCONV_INLINE static float key(float value) { return value; }
  FASTCONV_INLINE static bool is_nan(float key) { return key != key; }
};

template <int16_t kInfinity>
struct HalfOrder {
  using Bits = uint16_t;
  using Index = int16_t;
  static constexpr int16_t kNan = 0x7fff;

  static uint16_t lowest() { return static_cast<uint16_t>(kInfinity) | 0x8000; }
  FASTCONV_INLINE static int16_t key(uint16_t bits) {
    const int16_t magnitude = static_cast<int16_t>(bits & 0x7fff);
    const int16_t sign = static_cast<int16_t>(static_cast<int16_t>(bits) >> 15);
    const int16_t ordered = static_cast<int16_t>((magnitude ^ sign) - sign);
    return magnitude > kInfinity ? kNan : ordered;
  }
  FASTCONV_INLINE static bool is_nan(int16_t key) { return key == kNan; }
};

template <>
struct Order<BFloat16> : HalfOrder<0x7f80> {};

template <>
struct Order<Half> : HalfOrder<0x7c00> {};

// torch's rule, for keys: the first of equal maxima, the last of NaN.
template <class T, class Key>
FASTCONV_INLINE bool wins(Key value, Key best) {
  return (value > best) | Order<T>::is_nan(value);
}

// A window that lies inside the map, its taps known at compile time: no intermediate goes through memory.
template <int kTaps, class T, class Code, class Bits = typename Order<T>::Bits>
FASTCONV_INLINE void pool_whole(
    const Bits* const (&taps)[kTaps], Bits* __restrict output, Code* __restrict code, int64_t channels, bool relu) {
  using Index = typename Order<T>::Index;
  FASTCONV_VECTORIZE
  for (int64_t c = 0; c < channels; ++c) {
    auto best = taps[0][c];
    auto best_key = Order<T>::key(best);
    Index winner = 1;
    for (int tap = 1; tap < kTaps; ++tap) {
      const auto value = taps[tap][c];
      const auto key = Order<T>::key(value);
      const bool better = wins<T>(key, best_key);
      best = better ? value : best;
      best_key = better ? key : best_key;
      winner = better ? static_cast<Index>(tap + 1) : winner;
    }
    const bool open = !relu | !(best_key <= 0);
    output[c] = keep_if(open, best);
    code[c] = static_cast<Code>(keep_if(open, winner));
  }
}

template <class T, class Code, class Bits = typename Order<T>::Bits>
FASTCONV_INLINE void pool_any(
    const Bits* image, Bits* output, Code* code, const Windows& w, const Taps& rows, const Taps& columns, bool relu) {
  using Index = std::conditional_t<sizeof(Code) == 1, typename Order<T>::Index, int32_t>;
  Bits best[kBlock];
  Index winner[kBlock];
  for_blocks(w.channels, [&](int64_t first, auto block) FASTCONV_INLINE_LAMBDA {
    const int64_t width = block;
    // A window without a pixel (dilation can step over a small map) stays at -inf and passes no gradient.
    std::fill_n(best, width, Order<T>::lowest());
    std::fill_n(winner, width, Index{0});
    for (int64_t r = rows.begin; r < rows.end; ++r) {
      const Bits* const row = image + (rows.start + r * w.rows.dilation) * w.columns.size * w.channels + first;
      for (int64_t t = columns.begin; t < columns.end; ++t) {
        const Bits* const pixel = row + (columns.start + t * w.columns.dilation) * w.channels;
        const Index position = static_cast<Index>(1 + r * w.columns.kernel + t);
        FASTCONV_VECTORIZE
        for (int64_t c = 0; c < width; ++c) {
          const bool better = wins<T>(Order<T>::key(pixel[c]), Order<T>::key(best[c])) | (winner[c] == 0);
          best[c] = better ? pixel[c] : best[c];
          winner[c] = better ? position : winner[c];
        }
      }
    }
    FASTCONV_VECTORIZE
    for (int64_t c = 0; c < width; ++c) {
      const bool open = !relu | !(Order<T>::key(best[c]) <= 0);
      output[first + c] = keep_if(open, best[c]);
      code[first + c] = static_cast<Code>(keep_if(open, winner[c]));
    }
  });
}

// One row of windows. kSide: the square window that has a path of its own, or 0.
template <int kSide, class T, class Code, class Bits = typename Order<T>::Bits>
FASTCONV_INLINE void pool_row(const Bits* image, Bits* output, Code* code, const Windows& w, int64_t window_row, bool relu) {
  const int64_t channels = w.channels;
  const Taps rows = w.rows.taps(window_row);
  const bool whole_rows = rows.end - rows.begin == w.rows.kernel;
  for (int64_t column = 0; column < w.columns.windows; ++column, output += channels, code += channels) {
    const Taps columns = w.columns.taps(column);
    if constexpr (kSide > 0) {
      if (whole_rows && columns.end - columns.begin == w.columns.kernel) {
        const Bits* taps[kSide * kSide];
        for (int tap = 0; tap < kSide * kSide; ++tap) {
          const int64_t r = rows.start + tap / kSide * w.rows.dilation;
          const int64_t c = columns.start + tap % kSide * w.columns.dilation;
          taps[tap] = image + (r * w.columns.size + c) * channels;
        }
        pool_whole<kSide * kSide, T>(taps, output, code, channels, relu);
        continue;
      }
    }
    pool_any<T>(image, output, code, w, rows, columns, relu);
  }
}

template <int kSide, class T, class Code, class Bits = typename Order<T>::Bits>
void pool(const Bits* x, Bits* output, Code* code, const Windows& w, bool relu) {
  const int64_t row_size = w.columns.windows * w.channels;
  const int64_t image_size = w.rows.size * w.columns.size * w.channels;
  const int64_t items = w.batch * w.rows.windows;
  const Chunks chunks = Chunks::of(items, row_size * w.rows.kernel * w.columns.kernel, items);
  for_chunks(chunks.count, [=](int64_t first, int64_t last) FASTCONV_INLINE_LAMBDA {
    const int64_t end = chunks.end(last - 1);
    for (int64_t row = chunks.begin(first); row < end; ++row) {
      const Bits* const image = x + row / w.rows.windows * image_size;
      pool_row<kSide, T>(image, output + row * row_size, code + row * row_size, w, row % w.rows.windows, relu);
    }
  });
}

template <class T, class Code, class Bits = typename Order<T>::Bits>
void pool_by_window(const Bits* x, Bits* output, Code* code, const Windows& w, bool relu) {
  if constexpr (sizeof(Code) == 1) {
    if (w.rows.kernel == 2 && w.columns.kernel == 2) return pool<2, T>(x, output, code, w, relu);
    if (w.rows.kernel == 3 && w.columns.kernel == 3) return pool<3, T>(x, output, code, w, relu);
  }
  return pool<0, T>(x, output, code, w, relu);
}

}  // namespace

void max_pool2d(
    const Tensor& x, const Tensor& output, const Tensor& code, const Pair& kernel, const Pair& stride, const Pair& padding,
    const Pair& dilation, bool relu) {
  const Map pooled = map_of(output, "output");
  check_same(output, "output", pooled, x.scalar_type());
  check_same(code, "code", pooled, code.scalar_type());
  const Windows windows = Windows::of(map_of(x, "x"), pooled, kernel, stride, padding, dilation);
  by_dtype(x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    by_code(code.scalar_type(), [&](auto code_type) {
      using Code = typename decltype(code_type)::type;
      using Bits = typename Order<T>::Bits;
      pool_by_window<T>(read<Bits>(x), write<Bits>(output), write<Code>(code), windows, relu);
    });
  });
}

}  // namespace fastconv
