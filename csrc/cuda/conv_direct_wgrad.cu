// Weight gradient of convolutions whose groups have few channels: sums over runs of pixels, then their sums in order.
//
// A thread keeps sums of a part of a window for a vector of channels. Parts of larger windows (of groups that are taken by
// single channels also their input channels) lie beside each other in a block, so that they find its pixels in the cache.
#include "conv_direct.h"
#include "walk.h"

namespace fastconv {

struct DirectGradParams {
  WeightGradParams conv;
  Lanes lanes;
  int parts, block_parts, part_blocks;  // of a window: all, a block's, and how many blocks take all
  int runs, run_pixels;
};

// Taps whose sums a thread keeps, with those of G input channels for each output channel: no more than 72 vectors of sums.
template <int G>
constexpr int kPartRows = G == 1 ? 3 : 1;
template <int G>
constexpr int kPartColumns = G <= 2 ? 3 : 1;

template <class T, int V, int G>
__global__ void __launch_bounds__(kDirectThreads, 2) direct_weight_grad_kernel(const DirectGradParams d) {
  constexpr int kRows = kPartRows<G>, kColumns = kPartColumns<G>;
  const WeightGradParams& p = d.conv;
  int block = blockIdx.x;
  const int tile = block % d.lanes.tiles;
  block /= d.lanes.tiles;
  const int first_part = block % d.part_blocks * d.block_parts, run = block / d.part_blocks;
  const int pitch = p.channels * p.groups, out_pitch = p.out_channels * p.groups;
  const int passes = V == 1 ? p.channels : 1, part_columns = (p.kernel_w + kColumns - 1) / kColumns;
  const int row_of_lines = d.lanes.lanes * d.block_parts, pixel_lines = kDirectThreads / row_of_lines;

  float sums[kRows * kColumns][G][V];
  FASTCONV_UNROLL
  for (int tap = 0; tap < kRows * kColumns; ++tap) {
    FASTCONV_UNROLL
    for (int c = 0; c < G; ++c) {
      FASTCONV_UNROLL
      for (int i = 0; i < V; ++i) sums[tap][c][i] = 0.0f;
    }
  }
  const int channel = (tile * d.lanes.lanes + threadIdx.x % d.lanes.lanes) * V;
  const int part = first_part + threadIdx.x % row_of_lines / d.lanes.lanes, pixel_line = threadIdx.x / row_of_lines;
  if (channel < out_pitch && part < d.parts && pixel_line < pixel_lines) {
    const int pass = part % passes;
    const int tap_row = part / passes / part_columns * kRows, tap_column = part / passes % part_columns * kColumns;
    const int first_row = tap_row * p.dilation_h - p.pad_h, first_column = tap_column * p.dilation_w - p.pad_w;
    const int x_channel = V == 1 ? channel / p.out_channels * p.channels + pass : channel;
    const T* const grads = static_cast<const T*>(p.grad) + channel;
    const T* const map = static_cast<const T*>(p.x) + x_channel;
    const int64_t row_pitch = static_cast<int64_t>(p.width) * pitch;
    const int64_t next_column = static_cast<int64_t>(p.dilation_w) * pitch;
    const int64_t next_row = p.dilation_h * row_pitch - (kColumns - 1) * next_column;
    const int pixels = p.batch * p.out_height * p.out_width, first = run * d.run_pixels;
    const int last = first + d.run_pixels < pixels ? first + d.run_pixels : pixels;
    Walk at = Walk::of(first + pixel_line, pixel_lines, p.out_height, p.out_width);
    for (int pixel = first + pixel_line; pixel < last; pixel += pixel_lines) {
      float grad[V];
      load_channels<T, V>(grad, grads + static_cast<int64_t>(pixel) * out_pitch, true);
      const int top = at.row * p.stride_h + first_row, left = at.column * p.stride_w + first_column;
      const T* from = map + (static_cast<int64_t>(at.n) * p.height + top) * row_pitch + left * static_cast<int64_t>(pitch);
      FASTCONV_UNROLL
      for (int tap = 0; tap < kRows * kColumns; ++tap) {
        const int row = top + tap / kColumns * p.dilation_h, column = left + tap % kColumns * p.dilation_w;
        float x[V];  // where it is padding the gradient is still read: 0 times its NaN is NaN
        load_channels<T, V>(x, from, is_inside(row, p.height) && is_inside(column, p.width));
        from += tap % kColumns == kColumns - 1 ? next_row : next_column;
        FASTCONV_UNROLL
        for (int c = 0; c < G; ++c) {
          FASTCONV_UNROLL
          for (int i = 0; i < V; ++i) sums[tap][c][i] = fmaf(grad[i], x[i / G * G + c], sums[tap][c][i]);
        }
      }
      at.advance(p.out_height, p.out_width);
    }
  }

  // Lines of pixels are added up in order, a vector of sums of all threads at a time.
  const int taps = p.kernel_h * p.kernel_w;
  float* const rows = p.sums + static_cast<int64_t>(run) * out_pitch * taps * p.channels;
  FASTCONV_UNROLL
  for (int k = 0; k < kRows * kColumns * G; ++k) {
    const int tap = k / G, c = k % G;
    FASTCONV_UNROLL
    for (int i = 0; i < V; ++i) store_shared(shared_memory() + (i * kDirectThreads + threadIdx.x) * 4, sums[tap][c][i]);
    block_barrier();
    for (int index = threadIdx.x; index < row_of_lines * V; index += kDirectThreads) {
      const int thread = index % row_of_lines, own = first_part + thread / d.lanes.lanes;
      const int out = (tile * d.lanes.lanes + thread % d.lanes.lanes) * V + index / row_of_lines;
      const int row = own / passes / part_columns * kRows + tap / kColumns;
      const int column = own / passes % part_columns * kColumns + tap % kColumns;
      if (out >= out_pitch || own >= d.parts || row >= p.kernel_h || column >= p.kernel_w) continue;
      const uint32_t from = shared_memory() + (index / row_of_lines * kDirectThreads + thread) * 4;
      float sum = 0.0f;
      for (int line = 0; line < pixel_lines; ++line) sum += load_shared<float>(from + line * row_of_lines * 4);
      const int64_t to = (static_cast<int64_t>(out) * taps + row * p.kernel_w + column) * p.channels;
      store(rows + to + (V == 1 ? own % passes : c), sum);
    }
    block_barrier();
  }
}

namespace {

// Runs are as many as keep a GPU busy, but of no fewer than some pixels a thread.
template <int V, int G>
DirectGradParams cut(const WeightGradParams& p) {
  constexpr int64_t kWantedBlocks = 512, kMostRuns = 256, kLeastPixels = 8;
  DirectGradParams d{};
  d.conv = p;
  d.lanes = Lanes::of(static_cast<int64_t>(p.out_channels) * p.groups, V, Lanes::most(V));
  const int64_t part_rows = ceil_div(p.kernel_h, kPartRows<G>), part_columns = ceil_div(p.kernel_w, kPartColumns<G>);
  d.parts = static_cast<int>(part_rows * part_columns * (V == 1 ? p.channels : 1));
  d.part_blocks = static_cast<int>(ceil_div(d.parts, d.lanes.lines));
  d.block_parts = static_cast<int>(ceil_div(d.parts, d.part_blocks));
  const int64_t pixels = static_cast<int64_t>(p.batch) * p.out_height * p.out_width;
  if (pixels == 0) return d;
  const int64_t wanted = ceil_div(kWantedBlocks, static_cast<int64_t>(d.part_blocks) * d.lanes.tiles);
  const int64_t most = ceil_div(pixels, d.lanes.lines / d.block_parts * kLeastPixels);
  d.run_pixels = static_cast<int>(ceil_div(pixels, std::min({wanted, kMostRuns, most})));
  d.runs = static_cast<int>(ceil_div(pixels, d.run_pixels));
  return d;
}

// body(kernel's T, V and G, its parameters).
template <class Body>
void by_shape(ScalarType dtype, const WeightGradParams& p, const Body& body) {
  by_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::T;
    by_group<T>(p.channels, p.out_channels, p.groups, {p.x, p.grad}, [&](auto vector, auto group) {
      constexpr int V = decltype(vector)::value, G = decltype(group)::value;
      body(direct_weight_grad_kernel<T, V, G>, cut<V, G>(p), V);
    });
  });
}

}  // namespace

int direct_weight_grad_runs(ScalarType dtype, const WeightGradParams& p) {
  int runs = 0;
  by_shape(dtype, p, [&](auto, const DirectGradParams& d, int) { runs = d.runs; });
  return runs;
}

void launch_direct_weight_grad(Stream stream, ScalarType dtype, const WeightGradParams& p) {
  by_shape(dtype, p, [&](auto kernel, const DirectGradParams& d, int vector) {
    const int64_t blocks = static_cast<int64_t>(d.runs) * d.part_blocks * d.lanes.tiles;
    launch(stream, kernel, blocks, kDirectThreads, kDirectThreads * vector * 4, d);
  });
}

}  // namespace fastconv
