// How a Winograd convolution is cut into units of work; see docs/cpu.md for drawings.
#include "../operators.h"
#include "../parallel.h"
#include "../tensors.h"
#include "kernels.h"

#include <cstdlib>
namespace fastconv {

namespace {
int64_t env(const char* n, int64_t d) { const char* v = std::getenv(n); return v ? std::atoll(v) : d; }

template <class T>
const WinogradKernels<T>& kernels() {
  const KernelsOfAllTypes* all = &vec128::kKernels;
#if defined(__x86_64__)
  if (instruction_set() == InstructionSet::kAvx2) all = &avx2::kKernels;
  if (instruction_set() == InstructionSet::kAvx512) all = &avx512::kKernels;
#endif
  if constexpr (std::is_same_v<T, float>) return all->of_float->winograd;
  if constexpr (std::is_same_v<T, BFloat16>) return all->of_bfloat16->winograd;
  if constexpr (std::is_same_v<T, Half>) return all->of_half->winograd;
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

Tiles part(int64_t index, int64_t size, int64_t total) { return {index * size, std::min(size, total - index * size)}; }

// Filters that stay in the second cache beside a block of tiles: each unit is a block of tiles, from input to output.
template <class T>
void conv_by_tiles(const WinogradPass<T>& pass) {
  const WinogradKernels<T>& k = kernels<T>();
  const WinogradSizes& s = pass.sizes;
  const int64_t panels = ceil_div(s.out_channels, k.panel);
  const Planes u = Planes::packed(s.channels, k.panel);
  const Scratch filters(panels * u.size());
  constexpr int64_t kRows = 64;
  const int64_t blocks = ceil_div(s.channels, kRows);
  Workers(panels * blocks).run([&](int64_t unit, int64_t) {
    const int64_t panel = unit / blocks, r0 = unit % blocks * kRows;
    Planes to = u.at(filters.at(panel * u.size()));
    to.data += r0 * u.row;
    k.filter(pass.filter, panel * k.panel, r0, std::min(s.channels, r0 + kRows), to);
  });

  const int64_t budget = env("FC_BUDGET", 600) * 256;
  const int64_t tiles = env("FC_TB", std::clamp<int64_t>(budget / (36 * (s.channels + 16 + k.panel)) / 12 * 12, 12, 96));
  const Planes v = Planes::of(tiles, s.channels), m = Planes::of(tiles, k.panel);
  const Workers workers(ceil_div(s.tiles(), tiles));
  const Scratch memory(workers.count() * (v.size() + m.size()));
  workers.run([&](int64_t unit, int64_t worker) {
    const Planes inputs = v.at(memory.at(worker * (v.size() + m.size()))), products = m.at(inputs.data + v.size());
    const Tiles here = part(unit, tiles, s.tiles());
    k.input(s, pass.x, here, 0, s.channels, inputs);
    for (int64_t panel = 0; panel < panels; ++panel) {
      k.multiply(here.count, s.channels, inputs, u.at(filters.at(panel * u.size())), products, false);
      k.output(pass, here, panel * k.panel, products);
    }
  });
}

// Large filters: inputs are transformed first, by all; each unit is a panel of outputs of a part of the tiles, and transforms
// its filters as it goes, a block of channels at a time.
template <class T>
void conv_by_panels(const WinogradPass<T>& pass) {
  const WinogradKernels<T>& k = kernels<T>();
  const WinogradSizes& s = pass.sizes;
  const int64_t panels = ceil_div(s.out_channels, k.panel);
  const int64_t kChunk = env("FC_CHUNK", 256), kPart = env("FC_PART", 128), kRows = env("FC_ROWS", 64);
  constexpr int64_t kInputTiles = 8;
  const int64_t chunk = std::min(s.tiles(), kChunk);
  const Planes v = Planes::of(chunk, s.channels);
  const Planes u = Planes::packed(std::min(kRows, s.channels), k.panel), m = Planes::of(std::min(chunk, kPart), k.panel);
  const Scratch inputs(v.size());
  const Planes all = v.at(inputs.at(0));
  const int64_t parts = ceil_div(chunk, kPart);
  const Workers workers(parts * panels);
  const Scratch memory(workers.count() * (u.size() + m.size()));
  for (int64_t first = 0; first < s.tiles(); first += chunk) {
    const int64_t count = std::min(chunk, s.tiles() - first);
    Workers(ceil_div(count, kInputTiles)).run([&](int64_t unit, int64_t) {
      const Tiles here = part(unit, kInputTiles, count);
      Planes to = all;
      to.data += here.first * to.row;
      k.input(s, pass.x, {first + here.first, here.count}, 0, s.channels, to);
    });
    workers.run([&](int64_t unit, int64_t worker) {
      const Planes filters = u.at(memory.at(worker * (u.size() + m.size()))), products = m.at(filters.data + u.size());
      const Tiles here = part(unit % parts, kPart, count);
      if (here.count <= 0) return;
      const int64_t output = unit / parts * k.panel;
      Planes from = all;
      from.data += here.first * from.row;
      for (int64_t r = 0; r < s.channels; r += kRows, from.data += kRows) {
        const int64_t rows = std::min(kRows, s.channels - r);
        k.filter(pass.filter, output, r, r + rows, filters);
        k.multiply(here.count, rows, from, filters, products, r > 0);
      }
      k.output(pass, {first + here.first, here.count}, output, products);
    });
  }
}

template <class T>
void conv(const WinogradPass<T>& pass) {
  const WinogradSizes& s = pass.sizes;
  const bool few = env("FC_FEW", s.channels * s.out_channels >= (1 << 15) && s.tiles() <= 256);
  if (few) return conv_by_panels(pass);
  return conv_by_tiles(pass);
}

// Small filters: each unit sums a run of tiles into planes of its own. The number of runs depends on sizes only.
template <class T>
void weight_grad_by_tiles(const WinogradWeightGrad<T>& pass) {
  const WinogradKernels<T>& k = kernels<T>();
  const WinogradSizes& s = pass.sizes;
  const int64_t panels = ceil_div(s.channels, k.panel);
  const int64_t kRuns = env("FC_RUNS", 8), kTiles = env("FC_WTB", 48);
  const int64_t blocks = ceil_div(s.tiles(), kTiles), runs = std::min(kRuns, blocks);
  const Planes v = Planes::of(kTiles, panels * k.panel), g = Planes::of(kTiles, s.out_channels);
  const Planes sums = Planes::packed(s.out_channels, k.panel);
  const int64_t set = panels * sums.size();
  const Scratch total(runs * set);
  const Workers workers(runs);
  const Scratch memory(workers.count() * (v.size() + g.size()));
  workers.run([&](int64_t run, int64_t worker) {
    const Planes inputs = v.at(memory.at(worker * (v.size() + g.size()))), grads = g.at(inputs.data + v.size());
    for (int64_t block = blocks * run / runs, first = block; block < blocks * (run + 1) / runs; ++block) {
      const Tiles here = part(block, kTiles, s.tiles());
      k.input(s, pass.x, here, 0, s.channels, inputs);
      k.grad(s, pass.grad, here, 0, s.out_channels, grads);
      for (int64_t panel = 0; panel < panels; ++panel) {
        Planes from = inputs;
        from.data += panel * k.panel;
        k.multiply_grad(here.count, s.out_channels, grads, from, sums.at(total.at(run * set + panel * sums.size())), block > first);
      }
    }
  });
  constexpr int64_t kRows = 16;
  const int64_t row_blocks = ceil_div(s.out_channels, kRows);
  Workers(row_blocks * panels).run([&](int64_t unit, int64_t) {
    const int64_t panel = unit % panels, c0 = panel * k.panel, k0 = unit / panels * kRows;
    Planes from = sums.at(total.at(panel * sums.size()));
    from.data += k0 * from.row;
    k.filter_grad(pass, k0, std::min(s.out_channels, k0 + kRows), c0, std::min(s.channels, c0 + k.panel), from, runs, set);
  });
}

// Large filters: inputs and gradients of a chunk of tiles are transformed by all; each unit sums a panel of input channels and
// a block of output channels over the chunk.
template <class T>
void weight_grad_by_panels(const WinogradWeightGrad<T>& pass) {
  const WinogradKernels<T>& k = kernels<T>();
  const WinogradSizes& s = pass.sizes;
  const int64_t panels = ceil_div(s.channels, k.panel);
  const int64_t kChunk = env("FC_WCHUNK", 256), kBlock = env("FC_WBLOCK", 128);
  constexpr int64_t kUnitTiles = 8;
  const int64_t chunk = std::min(s.tiles(), kChunk);
  const Planes v = Planes::of(chunk, panels * k.panel), g = Planes::of(chunk, s.out_channels);
  const Scratch transformed(v.size() + g.size());
  const Planes inputs = v.at(transformed.at(0)), grads = g.at(transformed.at(v.size()));
  const int64_t blocks = ceil_div(s.out_channels, kBlock);
  const bool one = s.tiles() <= chunk;
  const Planes sums = Planes::packed(std::min(kBlock, s.out_channels), k.panel);
  const Workers workers(panels * blocks);
  const Scratch memory(sums.size() * (one ? workers.count() : panels * blocks));
  for (int64_t first = 0; first < s.tiles(); first += chunk) {
    const int64_t count = std::min(chunk, s.tiles() - first);
    Workers(ceil_div(count, kUnitTiles)).run([&](int64_t unit, int64_t) {
      const Tiles at = part(unit, kUnitTiles, count), here{first + at.first, at.count};
      Planes to = inputs, to_grads = grads;
      to.data += at.first * to.row;
      to_grads.data += at.first * to_grads.row;
      k.input(s, pass.x, here, 0, s.channels, to);
      k.grad(s, pass.grad, here, 0, s.out_channels, to_grads);
    });
    workers.run([&](int64_t unit, int64_t worker) {
      const int64_t c0 = unit / blocks * k.panel, k0 = unit % blocks * kBlock, k1 = std::min(s.out_channels, k0 + kBlock);
      const Planes to = sums.at(memory.at(sums.size() * (one ? worker : unit)));
      Planes from = inputs, from_grads = grads;
      from.data += c0;
      from_grads.data += k0;
      k.multiply_grad(count, k1 - k0, from_grads, from, to, first > 0);
      if (first + count == s.tiles()) k.filter_grad(pass, k0, k1, c0, std::min(s.channels, c0 + k.panel), to, 1, 0);
    });
  }
}

}  // namespace

void winograd_conv2d(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
    const Tensor& output, const std::optional<Tensor>& code, const Pair& size, const Pair& padding, bool relu, bool turned) {
  const Map from = map_of(x, "x"), filter = map_of(weight, "weight"), to = map_of(output, "output");
  const auto dtype = x.scalar_type();
  check_same(weight, "weight", filter, dtype);
  check_same(output, "output", to, dtype);
  if (code) check_same(*code, "code", to, ScalarType::Byte);
  if (residual) check_same(*residual, "residual", to, dtype);
  const int64_t reduction = turned ? filter.batch : filter.channels, outputs = turned ? filter.channels : filter.batch;
  STD_TORCH_CHECK(
      filter.height == 3 && filter.width == 3 && reduction == from.channels && outputs == to.channels,
      "fastconv_native: weight must be [K, C, 3, 3] of the channels of x and output");
  const WinogradSizes sizes{from.batch, from.height, from.width, from.channels, size[0], size[1], outputs, padding[0], padding[1]};
  by_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    conv(WinogradPass<T>{
        sizes,
        read<T>(x),
        {read<T>(weight), filter.batch, filter.channels, turned},
        {write<T>(output), code ? write<uint8_t>(*code) : nullptr, bias ? read<T>(*bias) : nullptr,
         residual ? read<T>(*residual) : nullptr, relu, to.height, to.width}});
  });
}

void winograd_weight_grad(const Tensor& grad, const Tensor& x, const Tensor& weight_grad, const Pair& padding) {
  const Map to = map_of(grad, "grad"), from = map_of(x, "x"), filter = map_of(weight_grad, "weight_grad");
  check_same(x, "x", from, grad.scalar_type());
  check_same(weight_grad, "weight_grad", filter, grad.scalar_type());
  STD_TORCH_CHECK(
      filter.height == 3 && filter.width == 3 && filter.batch == to.channels && filter.channels == from.channels,
      "fastconv_native: weight_grad must be [K, C, 3, 3] of the channels of grad and x");
  const WinogradSizes sizes{from.batch,  from.height,  from.width, from.channels, to.height,
                            to.width, to.channels, padding[0], padding[1]};
  by_dtype(grad.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const WinogradWeightGrad<T> pass{sizes, read<T>(x), read<T>(grad), write<T>(weight_grad)};
    const bool few = env("FC_WFEW", sizes.channels * sizes.out_channels >= (1 << 15) && sizes.tiles() <= 256);
    if (few) return weight_grad_by_panels(pass);
    weight_grad_by_tiles(pass);
  });
}

}  // namespace fastconv
