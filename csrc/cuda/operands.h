// Where a convolution's operands come from: sources of the engine in tile.h, which copy chunks of 16 bytes to a stage.
//
// Forward and input gradient are one product: rows are pixels of the output, k runs over taps and channels of the map that is
// gathered. The input gradient of a strided convolution is done by phases, the pixels that leave the same remainder: within
// one, it is a convolution of stride 1 by some of the taps, turned round. The weight gradient sums over pixels instead.
#pragma once

#include "tile.h"
#include "values.h"
#include "walk.h"

namespace fastconv {

// Of one dimension: pixel(i, tap) = start + i · stride + tap · step of the gathered map, if that is in [0, size).
struct Axis {
  int size, start, stride, step, taps;
  int first_tap, tap_step;  // tap is the weight's first_tap + tap · tap_step
};

struct ConvParams {
  const void* x;  // what is gathered, NHWC: the input, or the output's gradient
  const void* weight;
  const void* bias;
  const void* residual;
  void* y;
  uint8_t* code;
  int batch, height, width, out_height, out_width;  // of x, of y before a pool
  int channels, out_channels, groups;               // of x and of y, of one group
  int kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  int tiles_down, tiles_across;
  bool relu;
  bool stores_chunks;  // y and code are aligned to 16 bytes
};

FASTCONV_DEVICE Axis forward_axis(int size, int kernel, int stride, int pad, int dilation) {
  return {size, -pad, stride, dilation, kernel, 0, 1};
}

// Of the output's gradient, for the input's pixels phase + i · stride.
FASTCONV_DEVICE Axis grad_axis(int size, int phase, int kernel, int stride, int pad, int dilation) {
  int first = 0;
  while (first < kernel && (phase + pad - first * dilation) % stride != 0) ++first;
  int tap_step = 1;
  while (tap_step * dilation % stride != 0) ++tap_step;
  const int taps = (kernel - first + tap_step - 1) / tap_step;
  return {size, (phase + pad - first * dilation) / stride, 1, -(tap_step * dilation / stride), taps, first, tap_step};
}

// 16 bytes of elements that need not be neighbours; element(e) is where the e-th lies, null for a zero.
template <class T, class Element>
FASTCONV_DEVICE Words4 gather(const Element& element) {
  Words4 result{};
  FASTCONV_UNROLL
  for (int e = 0; e < kChunkBytes / static_cast<int>(sizeof(T)); ++e) {
    const T* const address = element(e);
    if constexpr (sizeof(T) == 4) {
      result.word[e] = address == nullptr ? 0u : load<uint32_t>(address);
    } else {
      result.word[e / 2] |= (address == nullptr ? 0u : static_cast<uint32_t>(load<uint16_t>(address))) << (e % 2 * 16);
    }
  }
  return result;
}

// One of a group's taps and channels, counted by k = tap · channels + channel.
struct TapChannel {
  int row, column, channel;

  FASTCONV_DEVICE void advance(int by, int channels, int columns) {
    channel += by;
    while (channel >= channels) {
      channel -= channels;
      if (++column == columns) {
        column = 0;
        ++row;
      }
    }
  }
  static FASTCONV_DEVICE TapChannel of(int k, int channels, int columns) {
    const int tap = k / channels;
    return {tap / columns, tap % columns, k % channels};
  }
};

// Rows: pixels of the output. k: taps and channels of x.
template <class S, bool kVector>
struct Pixels {
  using T = typename S::T;
  static constexpr Major kMajor = Major::kSum;
  using Place = Staging<T, S::kRows, kMajor, S::kThreads>;

  const ConvParams& p;
  const Axis vertical, horizontal;
  const T* image[Place::kPasses];  // null behind the last pixel
  int top[Place::kPasses], left[Place::kPasses];
  int k;
  TapChannel at;

  // `locate(row)`: image, row and column of the output, or image −1.
  template <class Locate>
  FASTCONV_DEVICE Pixels(const ConvParams& p, const Axis& vertical, const Axis& horizontal, int group, const Locate& locate)
      : p(p), vertical(vertical), horizontal(horizontal), k(Place::chunk() * Place::kVector) {
    at = TapChannel::of(k, p.channels, horizontal.taps > 0 ? horizontal.taps : 1);
    const int64_t image_size = static_cast<int64_t>(p.height) * p.width * p.channels * p.groups;
    FASTCONV_UNROLL
    for (int i = 0; i < Place::kPasses; ++i) {
      int n, row, column;
      locate(Place::line() + i * Place::kLineStep, n, row, column);
      image[i] = n < 0 ? nullptr : static_cast<const T*>(p.x) + n * image_size + group * p.channels;
      top[i] = vertical.start + row * vertical.stride;
      left[i] = horizontal.start + column * horizontal.stride;
    }
  }

  FASTCONV_DEVICE const T* element(int pass, const TapChannel& tap) const {
    const int row = top[pass] + tap.row * vertical.step, column = left[pass] + tap.column * horizontal.step;
    const bool is_there = image[pass] != nullptr && tap.row < vertical.taps && is_inside(row, p.height) && is_inside(column, p.width);
    if (!is_there) return nullptr;
    return image[pass] + (static_cast<int64_t>(row) * p.width + column) * (p.channels * p.groups) + tap.channel;
  }

  FASTCONV_DEVICE void fill(uint32_t stage) {
    const uint32_t to = stage + Place::address(Place::line(), Place::chunk());
    if constexpr (kVector) {
      FASTCONV_UNROLL
      for (int i = 0; i < Place::kPasses; ++i) {
        const T* const from = element(i, at);
        copy_async(to + i * Place::kLineStep * Place::kLineBytes, from == nullptr ? p.x : from, from != nullptr);
      }
      at.advance(Place::kDepth, p.channels, horizontal.taps);
    } else {
      TapChannel taps[Place::kVector];
      FASTCONV_UNROLL
      for (int e = 0; e < Place::kVector; ++e) taps[e] = TapChannel::of(k + e, p.channels, horizontal.taps);
      FASTCONV_UNROLL
      for (int i = 0; i < Place::kPasses; ++i) {
        store_shared(to + i * Place::kLineStep * Place::kLineBytes, gather<T>([&](int e) { return element(i, taps[e]); }));
      }
      k += Place::kDepth;
    }
  }
};

// Columns: output channels. k: taps and input channels, as the weight has them in memory.
template <class S, bool kVector>
struct WeightRows {
  using T = typename S::T;
  static constexpr Major kMajor = Major::kSum;
  using Place = Staging<T, S::kColumns, kMajor, S::kThreads>;

  const void* weight;
  const T* row[Place::kPasses];  // null behind the last channel
  int k, depth;

  FASTCONV_DEVICE WeightRows(const ConvParams& p, int group, int first)
      : weight(p.weight), k(Place::chunk() * Place::kVector), depth(p.kernel_h * p.kernel_w * p.channels) {
    FASTCONV_UNROLL
    for (int i = 0; i < Place::kPasses; ++i) {
      const int channel = first + Place::line() + i * Place::kLineStep;
      const int64_t offset = static_cast<int64_t>(group * p.out_channels + channel) * depth;
      row[i] = channel < p.out_channels ? static_cast<const T*>(p.weight) + offset : nullptr;
    }
  }

  FASTCONV_DEVICE void fill(uint32_t stage) {
    const uint32_t to = stage + Place::address(Place::line(), Place::chunk());
    FASTCONV_UNROLL
    for (int i = 0; i < Place::kPasses; ++i) {
      const uint32_t chunk = to + i * Place::kLineStep * Place::kLineBytes;
      if constexpr (kVector) {
        const bool is_there = row[i] != nullptr && k < depth;
        copy_async(chunk, is_there ? row[i] + k : weight, is_there);
      } else {
        store_shared(chunk, gather<T>([&](int e) { return row[i] != nullptr && k + e < depth ? row[i] + k + e : nullptr; }));
      }
    }
    k += Place::kDepth;
  }
};

// Columns: input channels. k: some of the taps, and output channels.
template <class S, bool kVector>
struct WeightColumns {
  using T = typename S::T;
  static constexpr Major kMajor = Major::kSide;
  using Place = Staging<T, S::kColumns, kMajor, S::kThreads>;

  const ConvParams& p;
  const Axis vertical, horizontal;
  const T* weight;
  TapChannel at[Place::kPasses];
  int channel;

  FASTCONV_DEVICE WeightColumns(const ConvParams& p, const Axis& vertical, const Axis& horizontal, int group, int first)
      : p(p), vertical(vertical), horizontal(horizontal), channel(first + Place::chunk() * Place::kVector) {
    const int64_t group_size = static_cast<int64_t>(p.channels) * p.kernel_h * p.kernel_w * p.out_channels;
    weight = static_cast<const T*>(p.weight) + group * group_size;
    FASTCONV_UNROLL
    for (int i = 0; i < Place::kPasses; ++i) {
      at[i] = TapChannel::of(Place::line() + i * Place::kLineStep, p.channels, horizontal.taps > 0 ? horizontal.taps : 1);
    }
  }

  FASTCONV_DEVICE void fill(uint32_t stage) {
    const uint32_t to = stage + Place::address(Place::line(), Place::chunk());
    FASTCONV_UNROLL
    for (int i = 0; i < Place::kPasses; ++i) {
      const int row = vertical.first_tap + at[i].row * vertical.tap_step;
      const int column = horizontal.first_tap + at[i].column * horizontal.tap_step;
      const int64_t tap = (static_cast<int64_t>(at[i].channel) * p.kernel_h + row) * p.kernel_w + column;
      const T* const from = weight + tap * p.out_channels + channel;
      const bool is_tap = at[i].row < vertical.taps;
      const uint32_t chunk = to + i * Place::kLineStep * Place::kLineBytes;
      if constexpr (kVector) {
        const bool is_there = is_tap && channel < p.out_channels;
        copy_async(chunk, is_there ? from : weight, is_there);
      } else {
        store_shared(chunk, gather<T>([&](int e) { return is_tap && channel + e < p.out_channels ? from + e : nullptr; }));
      }
      at[i].advance(Place::kDepth, p.channels, horizontal.taps);
    }
  }
};

struct WeightGradParams {
  const void* x;     // the input, NHWC
  const void* grad;  // of the output
  float* sums;       // [splits, out_channels · groups, taps · channels]
  int batch, height, width, out_height, out_width;
  int channels, out_channels, groups;
  int kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  int tiles_down, tiles_across, split_steps;
};

// Rows: output channels. k: pixels of the output, from `first_pixel` on.
template <class S, bool kVector>
struct GradColumns {
  using T = typename S::T;
  static constexpr Major kMajor = Major::kSide;
  using Place = Staging<T, S::kRows, kMajor, S::kThreads>;

  const T* grad;
  int channel, channels, pitch, pixel, pixels;

  FASTCONV_DEVICE GradColumns(const WeightGradParams& p, int group, int first, int first_pixel)
      : grad(static_cast<const T*>(p.grad) + group * p.out_channels),
        channel(first + Place::chunk() * Place::kVector),
        channels(p.out_channels),
        pitch(p.out_channels * p.groups),
        pixel(first_pixel + Place::line()),
        pixels(p.batch * p.out_height * p.out_width) {}

  FASTCONV_DEVICE void fill(uint32_t stage) {
    const uint32_t to = stage + Place::address(Place::line(), Place::chunk());
    FASTCONV_UNROLL
    for (int i = 0; i < Place::kPasses; ++i) {
      const int at = pixel + i * Place::kLineStep;
      const T* const from = grad + static_cast<int64_t>(at) * pitch + channel;
      const uint32_t chunk = to + i * Place::kLineStep * Place::kLineBytes;
      if constexpr (kVector) {
        const bool is_there = at < pixels && channel < channels;
        copy_async(chunk, is_there ? from : grad, is_there);
      } else {
        store_shared(chunk, gather<T>([&](int e) { return at < pixels && channel + e < channels ? from + e : nullptr; }));
      }
    }
    pixel += Place::kDepth;
  }
};

// Columns: taps and input channels. k: pixels of the output, from `first_pixel` on.
template <class S, bool kVector>
struct PixelColumns {
  using T = typename S::T;
  static constexpr Major kMajor = Major::kSide;
  using Place = Staging<T, S::kColumns, kMajor, S::kThreads>;
  static constexpr int kColumns = kVector ? 1 : Place::kVector;  // of a chunk, that lie in places of their own

  const WeightGradParams& p;
  const T* x;
  Walk pixel[Place::kPasses];
  TapChannel at[kColumns];

  FASTCONV_DEVICE PixelColumns(const WeightGradParams& p, int group, int first, int first_pixel)
      : p(p), x(static_cast<const T*>(p.x) + group * p.channels) {
    FASTCONV_UNROLL
    for (int e = 0; e < kColumns; ++e) at[e] = TapChannel::of(first + Place::chunk() * Place::kVector + e, p.channels, p.kernel_w);
    FASTCONV_UNROLL
    for (int i = 0; i < Place::kPasses; ++i) {
      pixel[i] = Walk::of(first_pixel + Place::line() + i * Place::kLineStep, Place::kDepth, p.out_height, p.out_width);
    }
  }

  FASTCONV_DEVICE const T* element(int pass, const TapChannel& tap) const {
    const Walk& at = pixel[pass];
    const int row = at.row * p.stride_h - p.pad_h + tap.row * p.dilation_h;
    const int column = at.column * p.stride_w - p.pad_w + tap.column * p.dilation_w;
    const bool is_there =
        at.n < p.batch && tap.row < p.kernel_h && is_inside(row, p.height) && is_inside(column, p.width);
    if (!is_there) return nullptr;
    return x + ((static_cast<int64_t>(at.n) * p.height + row) * p.width + column) * (p.channels * p.groups) + tap.channel;
  }

  FASTCONV_DEVICE void fill(uint32_t stage) {
    const uint32_t to = stage + Place::address(Place::line(), Place::chunk());
    FASTCONV_UNROLL
    for (int i = 0; i < Place::kPasses; ++i) {
      const uint32_t chunk = to + i * Place::kLineStep * Place::kLineBytes;
      if constexpr (kVector) {
        const T* const from = element(i, at[0]);
        copy_async(chunk, from == nullptr ? x : from, from != nullptr);
      } else {
        store_shared(chunk, gather<T>([&](int e) { return element(i, at[e]); }));
      }
      pixel[i].advance(p.out_height, p.out_width);
    }
  }
};

}  // namespace fastconv
