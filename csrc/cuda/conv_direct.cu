// Forward and input gradient of convolutions whose groups have few channels: passes over maps, weights in shared memory.
//
// A thread takes a vector of channels of four pixels, one below the other (with a pool, a window's), so that it reads a weight
// once for four. Windows that step by single rows slide: of four pixels' 3×3 windows 18 vectors are read, not 36.
#include "conv_direct.h"
#include "windows.h"

namespace fastconv {

constexpr int kRun = 4;  // pixels of a thread

struct DirectParams {
  ConvParams conv;
  Lanes lanes;
  int block_units, parts;  // runs of pixels that a block takes, blocks that take a phase's
  bool is_input_grad;
};

// The same pixels from the last tap back, where they lie upward: a window always slides down.
FASTCONV_DEVICE Axis downward(const Axis& axis) {
  if (axis.step >= 0) return axis;
  const int last = axis.taps - 1;
  return {axis.size, axis.start + last * axis.step, axis.stride,    -axis.step,
          axis.taps, axis.first_tap + last * axis.tap_step, -axis.tap_step};
}

// Runs of pixels of a phase: of the input gradient those of every stride-th row and column, else all.
template <bool kPool>
struct PixelRuns {
  int height, width, rows, columns;  // of pixels, of runs

  FASTCONV_DEVICE PixelRuns(int height, int width)
      : height(height),
        width(width),
        rows(kPool ? height / 2 : (height + kRun - 1) / kRun),
        columns(kPool ? width / 2 : width) {}

  static FASTCONV_DEVICE int row(int run, int member) { return kPool ? 2 * run + member / 2 : kRun * run + member; }
  static FASTCONV_DEVICE int column(int run, int member) { return kPool ? 2 * run + member % 2 : run; }
};

constexpr int kLinePadding = 4;  // floats, so that a channel's weights, which lie together in memory, go to different banks

// Lines of shared memory: of the block's channels, weights of tap · channels + channel of the group, behind them biases.
struct WeightLines {
  int pitch, depth;

  FASTCONV_DEVICE uint32_t address(int line, int channel) const { return shared_memory() + (line * pitch + channel) * 4; }

  template <class T>
  FASTCONV_DEVICE void fill(const DirectParams& d, const Axis& vertical, const Axis& horizontal, int first) const {
    const ConvParams& p = d.conv;
    const int count = pitch - kLinePadding;
    const T* const weight = static_cast<const T*>(p.weight);
    const int all = p.out_channels * p.groups;
    for (int index = threadIdx.x; index < count * depth; index += kDirectThreads) {
      const int line = index % depth, channel = index / depth, out = first + channel;
      if (out >= all) break;
      const int tap = line / p.channels, from = line % p.channels;
      const int row = vertical.first_tap + tap / horizontal.taps * vertical.tap_step;
      const int column = horizontal.first_tap + tap % horizontal.taps * horizontal.tap_step;
      // The weight lies [output channel, taps, input channel of a group].
      const int output = d.is_input_grad ? out / p.out_channels * p.channels + from : out;
      const int input = d.is_input_grad ? out % p.out_channels : from;
      const int inputs = d.is_input_grad ? p.out_channels : p.channels;
      const int64_t taps = static_cast<int64_t>(output) * p.kernel_h + row;
      store_shared(address(line, channel), widen(load<T>(weight + (taps * p.kernel_w + column) * inputs + input)));
    }
    for (int channel = threadIdx.x; channel < count; channel += kDirectThreads) {
      const T* const bias = static_cast<const T*>(p.bias) + first + channel;
      store_shared(address(depth, channel), p.bias != nullptr && first + channel < all ? widen(load<T>(bias)) : 0.0f);
    }
  }
};

// A thread's sums: V channels of groups of G (of a single channel, V = 1, groups of any size) by kRun pixels.
template <class T, int V, int G, bool kPool>
struct DirectSums {
  const ConvParams& p;
  const Axis &vertical, &horizontal;
  const WeightLines& lines;
  const T* x;              // of an image, from the first channel that is read
  int top, left, channel;  // where the first pixel's window lies; of the block
  float at[kRun][V];

  FASTCONV_DEVICE int64_t pixel_pitch() const { return p.channels * p.groups; }
  FASTCONV_DEVICE int64_t row_pitch() const { return p.width * pixel_pitch(); }

  // Any window.
  FASTCONV_DEVICE void add_tap(int tap_row, int tap_column, int pass) {
    const int row = top + tap_row * vertical.step, column = left + tap_column * horizontal.step;
    const T* const from = x + row * row_pitch() + column * pixel_pitch() + pass;
    float values[kRun][V];
    FASTCONV_UNROLL
    for (int r = 0; r < kRun; ++r) {
      const int down = PixelRuns<kPool>::row(0, r) * vertical.stride;
      const int across = PixelRuns<kPool>::column(0, r) * horizontal.stride;
      const bool is_there = is_inside(row + down, p.height) && is_inside(column + across, p.width);
      load_channels<T, V>(values[r], from + down * row_pitch() + across * pixel_pitch(), is_there);
    }
    const int line = (tap_row * horizontal.taps + tap_column) * p.channels + pass;
    FASTCONV_UNROLL
    for (int c = 0; c < G; ++c) {
      float weight[V];
      load_shared_floats(weight, lines.address(line + c, channel));
      FASTCONV_UNROLL
      for (int r = 0; r < kRun; ++r) {
        FASTCONV_UNROLL
        for (int i = 0; i < V; ++i) at[r][i] = fmaf(values[r][i / G * G + c], weight[i], at[r][i]);
      }
    }
  }

  // A column of a window of kHeight rows that steps by single rows.
  template <int kHeight>
  FASTCONV_DEVICE void add_column(int tap_column, int pass) {
    float weight[kHeight][V];
    FASTCONV_UNROLL
    for (int tap = 0; tap < kHeight; ++tap) {
      const int line = (tap * horizontal.taps + tap_column) * p.channels + pass;
      load_shared_floats(weight[tap], lines.address(line, channel));
    }
    const int column = left + tap_column * horizontal.step, height = is_inside(column, p.width) ? p.height : 0;
    const T* from = x + top * row_pitch() + column * pixel_pitch() + pass;
    const int64_t row_step = row_pitch();
    FASTCONV_UNROLL
    for (int j = 0; j < kRun + kHeight - 1; ++j) {
      float values[V];
      load_channels<T, V>(values, from, is_inside(top + j, height));
      from += row_step;
      FASTCONV_UNROLL
      for (int r = 0; r < kRun; ++r) {
        if (j < r || j >= r + kHeight) continue;
        FASTCONV_UNROLL
        for (int i = 0; i < V; ++i) at[r][i] = fmaf(values[i], weight[j - r][i], at[r][i]);
      }
    }
  }
};

// y = relu(sums + bias + residual), rounded once; `offset` is of y and of the residual.
template <class T, int V>
FASTCONV_DEVICE void finish_pixel(float (&sums)[V], const float (&bias)[V], const ConvParams& p, int64_t offset) {
  FASTCONV_UNROLL
  for (int i = 0; i < V; ++i) sums[i] += bias[i];
  if (p.residual != nullptr) {
    float residual[V];
    load_channels<T, V>(residual, static_cast<const T*>(p.residual) + offset, true);
    FASTCONV_UNROLL
    for (int i = 0; i < V; ++i) sums[i] += residual[i];
  }
  if (p.relu) {
    FASTCONV_UNROLL
    for (int i = 0; i < V; ++i) sums[i] = relu(sums[i]);
  }
  store_channels<T, V>(static_cast<T*>(p.y) + offset, sums);
}

// y = relu(max of a window's sums + bias), and which pixel won, or that ReLU closed.
template <class T, int V>
FASTCONV_DEVICE void finish_window(
    const float (&sums)[kRun][V], const float (&bias)[V], const ConvParams& p, int64_t offset) {
  float best[V];
  int code[V];
  FASTCONV_UNROLL
  for (int i = 0; i < V; ++i) {
    best[i] = sums[0][i];
    code[i] = 1;
    FASTCONV_UNROLL
    for (int r = 1; r < kRun; ++r) {
      const bool wins = is_update(sums[r][i], best[i]);
      best[i] = wins ? sums[r][i] : best[i];
      code[i] = wins ? 1 + r : code[i];
    }
    best[i] += bias[i];
    code[i] = best[i] <= 0.0f ? 0 : code[i];
    best[i] = relu(best[i]);
  }
  store_channels<T, V>(static_cast<T*>(p.y) + offset, best);
  store_codes<uint8_t, V>(p.code + offset, code);
}

// kHeight: of a window that slides, 0 for all others.
template <class T, int V, int G, int kHeight, bool kPool>
__global__ void __launch_bounds__(kDirectThreads, 2) direct_kernel(const DirectParams d) {
  const ConvParams& p = d.conv;
  int block = blockIdx.x;
  const int first_channel = block % d.lanes.tiles * d.lanes.lanes * V;
  block /= d.lanes.tiles;
  const int first_unit = block % d.parts * d.block_units;
  const int phase = block / d.parts, phase_h = phase / p.stride_w, phase_w = phase % p.stride_w;
  // A phase's pixel i is phase + i · step of y.
  const int step_h = d.is_input_grad ? p.stride_h : 1, step_w = d.is_input_grad ? p.stride_w : 1;
  const Axis vertical = downward(
      d.is_input_grad ? grad_axis(p.height, phase_h, p.kernel_h, p.stride_h, p.pad_h, p.dilation_h)
                      : forward_axis(p.height, p.kernel_h, p.stride_h, p.pad_h, p.dilation_h));
  const Axis horizontal = downward(
      d.is_input_grad ? grad_axis(p.width, phase_w, p.kernel_w, p.stride_w, p.pad_w, p.dilation_w)
                      : forward_axis(p.width, p.kernel_w, p.stride_w, p.pad_w, p.dilation_w));
  const PixelRuns<kPool> runs((p.out_height - phase_h + step_h - 1) / step_h, (p.out_width - phase_w + step_w - 1) / step_w);
  const int units = p.batch * runs.rows * runs.columns;
  const int last_unit = first_unit + d.block_units < units ? first_unit + d.block_units : units;
  const WeightLines lines{d.lanes.lanes * V + kLinePadding, vertical.taps * horizontal.taps * p.channels};
  lines.fill<T>(d, vertical, horizontal, first_channel);
  block_barrier();

  const int all = p.out_channels * p.groups, own = threadIdx.x % d.lanes.lanes * V, channel = first_channel + own;
  const int line = threadIdx.x / d.lanes.lanes;
  if (channel >= all || line >= d.lanes.lines) return;
  const int x_channel = V == 1 ? channel / p.out_channels * p.channels : channel;
  const int passes = V == 1 ? p.channels : 1;
  const int64_t image_size = static_cast<int64_t>(p.height) * p.width * p.channels * p.groups;
  const int64_t below = static_cast<int64_t>(step_h) * p.out_width * all;  // from a pixel of a run to the next one
  for (int unit = first_unit + line; unit < last_unit; unit += d.lanes.lines) {
    const Position at = Position::of(unit, runs.rows, runs.columns);
    const int row = runs.row(at.row, 0), column = runs.column(at.column, 0);
    DirectSums<T, V, G, kPool> sums{
        p, vertical, horizontal, lines, static_cast<const T*>(p.x) + at.n * image_size + x_channel,
        vertical.start + row * vertical.stride, horizontal.start + column * horizontal.stride, own, {}};
    if constexpr (kHeight > 0) {
      for (int tap_column = 0; tap_column < horizontal.taps; ++tap_column) {
        for (int pass = 0; pass < passes; ++pass) sums.template add_column<kHeight>(tap_column, pass);
      }
    } else {
      for (int tap_row = 0; tap_row < vertical.taps; ++tap_row) {
        for (int tap_column = 0; tap_column < horizontal.taps; ++tap_column) {
          for (int pass = 0; pass < passes; ++pass) sums.add_tap(tap_row, tap_column, pass);
        }
      }
    }
    float bias[V];
    load_shared_floats(bias, lines.address(lines.depth, own));
    if constexpr (kPool) {
      finish_window<T, V>(sums.at, bias, p, static_cast<int64_t>(unit) * all + channel);
    } else {
      const int64_t pixel = pixel_of(at.n, phase_h + row * step_h, phase_w + column * step_w, p.out_height, p.out_width);
      FASTCONV_UNROLL
      for (int r = 0; r < kRun; ++r) {
        if (row + r < runs.height) finish_pixel<T, V>(sums.at[r], bias, p, pixel * all + channel + r * below);
      }
    }
  }
}

namespace {

template <class T, int V, int G, int kHeight, bool kPool>
void launch_shape(Stream stream, DirectParams d) {
  constexpr int64_t kWantedBlocks = 1024, kMostSteps = 8;
  constexpr int kWantedBytes = 48 << 10;
  const ConvParams& p = d.conv;
  const int64_t phases = d.is_input_grad ? static_cast<int64_t>(p.stride_h) * p.stride_w : 1;
  const int64_t height = d.is_input_grad ? ceil_div(p.out_height, p.stride_h) : p.out_height;
  const int64_t width = d.is_input_grad ? ceil_div(p.out_width, p.stride_w) : p.out_width;
  const int64_t units = p.batch * (kPool ? height / 2 * (width / 2) : ceil_div(height, kRun) * width);
  const int64_t weight_lines = static_cast<int64_t>(p.kernel_h) * p.kernel_w * p.channels + 1;
  const auto bytes = [&] { return weight_lines * (d.lanes.lanes * V + kLinePadding) * 4; };
  const int64_t channels = static_cast<int64_t>(p.out_channels) * p.groups;
  d.lanes = Lanes::of(channels, V, Lanes::most(V));
  while (bytes() > kWantedBytes && d.lanes.lanes > 1) d.lanes = Lanes::of(channels, V, d.lanes.lanes / 2);
  // A block reads its weights once for all its pixels, of which it takes the more the more there are.
  const int64_t steps = phases * units * d.lanes.tiles / (d.lanes.lines * kWantedBlocks);
  d.block_units = d.lanes.lines * static_cast<int>(std::clamp<int64_t>(steps, 1, kMostSteps));
  d.parts = static_cast<int>(ceil_div(units, d.block_units));
  const int64_t blocks = phases * d.parts * d.lanes.tiles;
  launch(stream, direct_kernel<T, V, G, kHeight, kPool>, blocks, kDirectThreads, static_cast<int>(bytes()), d);
}

template <class T, int V, int G>
void launch_group(Stream stream, Route route, const DirectParams& d) {
  const ConvParams& p = d.conv;
  if (route == Route::kForwardPool) return launch_shape<T, V, G, 0, true>(stream, d);
  if constexpr (G == 1) {
    const int slides = p.stride_h == 1 && p.dilation_h == 1 ? p.kernel_h : 0;
    if (slides == 3) return launch_shape<T, V, G, 3, false>(stream, d);
    if constexpr (V > 1) {
      if (slides == 5) return launch_shape<T, V, G, 5, false>(stream, d);
      if (slides == 7) return launch_shape<T, V, G, 7, false>(stream, d);
    }
  }
  launch_shape<T, V, G, 0, false>(stream, d);
}

}  // namespace

void launch_direct(Stream stream, ScalarType dtype, Route route, const ConvParams& p) {
  DirectParams d{};
  d.conv = p;
  d.is_input_grad = route == Route::kInputGrad;
  by_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::T;
    by_group<T>(p.channels, p.out_channels, p.groups, {p.x, p.y, p.residual, p.code}, [&](auto vector, auto group) {
      launch_group<T, decltype(vector)::value, decltype(group)::value>(stream, route, d);
    });
  });
}

}  // namespace fastconv
