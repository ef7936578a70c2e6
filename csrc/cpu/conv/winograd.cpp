// How a Winograd convolution is cut into units of work; docs/cpu.md draws it. What a unit is may depend on the number of
// threads, the order of a sum may not.
#include "../memory.h"
#include "../parallel.h"
#include "conv3x3_operands.h"
#include "dispatch.h"

namespace fastconv {

namespace {

constexpr int64_t kFewTiles = 8;  // worth a unit that only transforms

Tiles part(int64_t index, int64_t size, int64_t total) { return {index * size, std::min(size, total - index * size)}; }

Planes shifted(Planes planes, int64_t rows, int64_t columns) {
  planes.data += rows * planes.row + columns;
  return planes;
}

// Transformed filters, a panel of outputs after the other: `at(filters, panel)` are the planes of one.
struct Filters {
  int64_t channels, panels, panel;  // of the reduction; of outputs, and their width

  template <class T>
  static Filters of(int64_t channels, int64_t out_channels) {
    const int64_t panel = winograd_kernels<T>().panel;
    return {channels, ceil_div(out_channels, panel), panel};
  }
  Planes planes() const { return Planes::packed(channels, panel); }
  int64_t size() const { return panels * planes().size(); }
  Planes at(float* filters, int64_t index) const { return planes().at(filters + index * planes().size()); }
};

template <class T>
void transform_filters(const Conv3x3Filter<T>& filter, const Filters& to, float* filters) {
  const WinogradKernels<T>& k = winograd_kernels<T>();
  constexpr int64_t kRows = 64;
  const int64_t blocks = ceil_div(to.channels, kRows);
  Workers(to.panels * blocks).run([&](int64_t unit, int64_t) {
    const int64_t panel = unit / blocks, r0 = unit % blocks * kRows;
    k.filter(filter, panel * k.panel, r0, std::min(to.channels, r0 + kRows), shifted(to.at(filters, panel), r0, 0));
  });
}

// Each unit is a block of tiles, from input to output, and reads a filter that was transformed before, by all. The block and
// its products stay in the second cache, the filter in the third.
template <class T>
void conv_by_tiles(const Conv3x3Pass<T>& pass, const float* prepared) {
  const WinogradKernels<T>& k = winograd_kernels<T>();
  const Conv3x3Sizes& s = pass.sizes;
  const Filters u = Filters::of<T>(s.channels, s.out_channels);
  const Scratch own(prepared == nullptr ? u.size() : 0);
  if (prepared == nullptr) transform_filters(pass.filter, u, own.at(0));
  float* const filters = prepared == nullptr ? own.at(0) : const_cast<float*>(prepared);  // read only, from here on

  constexpr int64_t kCacheFloats = 150'000;
  const int64_t room = kCacheFloats / (36 * (s.channels + 16 + k.panel)) / 12 * 12;
  const int64_t block = std::clamp<int64_t>(std::min(room, ceil_div(count_tiles(s), threads())), 12, 96);
  const Planes v = Planes::of(block, s.channels), m = Planes::of(block, k.panel);
  const Workers workers(ceil_div(count_tiles(s), block));
  const Scratch memory(workers.count() * (v.size() + m.size()));
  workers.run([&](int64_t unit, int64_t worker) {
    const Planes inputs = v.at(memory.at(worker * (v.size() + m.size()))), products = m.at(inputs.data + v.size());
    const Tiles here = part(unit, block, count_tiles(s));
    k.input(s, pass.x, here, inputs);
    for (int64_t panel = 0; panel < u.panels; ++panel) {
      k.multiply(here.count, s.channels, inputs, u.at(filters, panel), products, false);
      k.output(pass, here, panel * k.panel, products);
    }
  });
}

// Inputs are transformed first, by all; each unit is a panel of outputs for a part of the tiles, and transforms its filters as
// it goes, a block of channels at a time: no transformed filter goes through memory, which would take longer.
template <class T>
void conv_by_panels(const Conv3x3Pass<T>& pass) {
  const WinogradKernels<T>& k = winograd_kernels<T>();
  const Conv3x3Sizes& s = pass.sizes;
  constexpr int64_t kChunk = 256, kPart = 128, kRows = 64;
  const int64_t panels = ceil_div(s.out_channels, k.panel);
  const int64_t chunk = std::min(count_tiles(s), kChunk);
  const int64_t size = std::min(kPart, std::max<int64_t>(24, ceil_div(chunk * panels, 2 * threads())));
  const int64_t parts = ceil_div(chunk, size);
  const Planes v = Planes::of(chunk, s.channels);
  const Planes u = Planes::packed(std::min(kRows, s.channels), k.panel), m = Planes::of(std::min(chunk, size), k.panel);
  const Scratch inputs(v.size());
  const Planes all = v.at(inputs.at(0));
  const Workers workers(parts * panels);
  const Scratch memory(workers.count() * (u.size() + m.size()));
  for (int64_t first = 0; first < count_tiles(s); first += chunk) {
    const int64_t count = std::min(chunk, count_tiles(s) - first);
    Workers(ceil_div(count, kFewTiles)).run([&](int64_t unit, int64_t) {
      const Tiles here = part(unit, kFewTiles, count);
      k.input(s, pass.x, {first + here.first, here.count}, shifted(all, here.first, 0));
    });
    workers.run([&](int64_t unit, int64_t worker) {
      const Planes filters = u.at(memory.at(worker * (u.size() + m.size()))), products = m.at(filters.data + u.size());
      const Tiles here = part(unit % parts, size, count);
      if (here.count <= 0) return;
      const int64_t output = unit / parts * k.panel;
      for (int64_t r = 0; r < s.channels; r += kRows) {
        const int64_t rows = std::min(kRows, s.channels - r);
        k.filter(pass.filter, output, r, r + rows, filters);
        k.multiply(here.count, rows, shifted(all, here.first, r), filters, products, r > 0);
      }
      k.output(pass, {first + here.first, here.count}, output, products);
    });
  }
}

// A transformed filter is read again for each block of tiles: it has to lie in a cache.
bool lies_in_a_cache(int64_t channels, int64_t out_channels) { return channels * out_channels <= 256 * 256; }

// Larger ones of a net's many layers are not there any more at the next call: to read them takes as long as to make them.
bool pays_prepared(int64_t channels, int64_t out_channels) { return channels * out_channels <= 128 * 128; }

// And to be worth its transform, unless that was done before.
bool filter_fits(const Conv3x3Sizes& s, bool prepared) {
  return lies_in_a_cache(s.channels, s.out_channels) && (prepared || count_tiles(s) >= 128);
}

// Each unit sums a run of tiles into planes of its own. Runs are as many as sizes say, whatever the number of threads.
template <class T>
void weight_grad_by_tiles(const Conv3x3WeightGrad<T>& pass) {
  const WinogradKernels<T>& k = winograd_kernels<T>();
  const Conv3x3Sizes& s = pass.sizes;
  constexpr int64_t kBlock = 64, kMostRuns = 16, kRows = 16;
  const int64_t panels = ceil_div(s.channels, k.panel);
  const int64_t blocks = ceil_div(count_tiles(s), kBlock), runs = std::clamp<int64_t>(blocks / 8, 1, kMostRuns);
  const Planes v = Planes::of(kBlock, panels * k.panel), g = Planes::of(kBlock, s.out_channels);
  const Planes sums = Planes::packed(s.out_channels, k.panel);
  const int64_t set = panels * sums.size();
  const Scratch total(runs * set);
  const Workers workers(runs);
  const Scratch memory(workers.count() * (v.size() + g.size()));
  workers.run([&](int64_t run, int64_t worker) {
    const Planes inputs = v.at(memory.at(worker * (v.size() + g.size()))), grads = g.at(inputs.data + v.size());
    const int64_t first = blocks * run / runs, last = blocks * (run + 1) / runs;
    for (int64_t block = first; block < last; ++block) {
      const Tiles here = part(block, kBlock, count_tiles(s));
      k.input(s, pass.x, here, inputs);
      k.grad(s, pass.grad, here, grads);
      for (int64_t panel = 0; panel < panels; ++panel) {
        const Planes to = sums.at(total.at(run * set + panel * sums.size()));
        k.multiply_grad(here.count, s.out_channels, grads, shifted(inputs, 0, panel * k.panel), to, block > first);
      }
    }
  });
  Workers(ceil_div(s.out_channels, kRows) * panels).run([&](int64_t unit, int64_t) {
    const int64_t panel = unit % panels, c0 = panel * k.panel, k0 = unit / panels * kRows;
    const int64_t k1 = std::min(s.out_channels, k0 + kRows), c1 = std::min(s.channels, c0 + k.panel);
    k.filter_grad(pass, k0, k1, c0, c1, shifted(sums.at(total.at(panel * sums.size())), k0, 0), runs, set);
  });
}

// Inputs and gradients of a chunk of tiles are transformed by all; each unit adds up a panel of input channels and a block of
// output channels over the chunk.
template <class T>
void weight_grad_by_panels(const Conv3x3WeightGrad<T>& pass) {
  const WinogradKernels<T>& k = winograd_kernels<T>();
  const Conv3x3Sizes& s = pass.sizes;
  constexpr int64_t kChunk = 128, kBlock = 128;
  const int64_t panels = ceil_div(s.channels, k.panel);
  const int64_t chunk = std::min(count_tiles(s), kChunk);
  const int64_t wanted = ceil_div(s.out_channels * panels, 2 * threads()), multiple = ceil_div(wanted, 12) * 12;
  const int64_t block = std::min({s.out_channels, kBlock, multiple}), blocks = ceil_div(s.out_channels, block);
  const Planes v = Planes::of(chunk, panels * k.panel), g = Planes::of(chunk, s.out_channels);
  const Scratch transformed(v.size() + g.size());
  const Planes inputs = v.at(transformed.at(0)), grads = g.at(transformed.at(v.size()));
  const Planes sums = Planes::packed(block, k.panel);
  const Workers workers(panels * blocks);
  const bool one = count_tiles(s) <= chunk;  // nothing to keep from chunk to chunk
  const Scratch memory(sums.size() * (one ? workers.count() : panels * blocks));
  for (int64_t first = 0; first < count_tiles(s); first += chunk) {
    const int64_t count = std::min(chunk, count_tiles(s) - first);
    Workers(ceil_div(count, kFewTiles)).run([&](int64_t unit, int64_t) {
      const Tiles at = part(unit, kFewTiles, count), here{first + at.first, at.count};
      k.input(s, pass.x, here, shifted(inputs, at.first, 0));
      k.grad(s, pass.grad, here, shifted(grads, at.first, 0));
    });
    workers.run([&](int64_t unit, int64_t worker) {
      const int64_t c0 = unit / blocks * k.panel, c1 = std::min(s.channels, c0 + k.panel);
      const int64_t k0 = unit % blocks * block, k1 = std::min(s.out_channels, k0 + block);
      const Planes to = sums.at(memory.at(sums.size() * (one ? worker : unit)));
      k.multiply_grad(count, k1 - k0, shifted(grads, 0, k0), shifted(inputs, 0, c0), to, first > 0);
      if (first + count == count_tiles(s)) k.filter_grad(pass, k0, k1, c0, c1, to, 1, 0);
    });
  }
}

// Sums of several runs cost memory and a pass over it: for few channels and many tiles.
bool runs_pay(const Conv3x3Sizes& s) { return s.channels * s.out_channels <= 64 * 64 && count_tiles(s) >= 1024; }

}  // namespace

void winograd_conv2d(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
    const Tensor& output, const std::optional<Tensor>& code, const Pair& size, const Pair& padding, bool relu, bool turned,
    const std::optional<Tensor>& filters) {
  const Conv3x3Operands operands(x, weight, bias, residual, output, code, size, padding, relu, turned);
  const Conv3x3Sizes& sizes = operands.sizes();
  STD_TORCH_CHECK(!(filters && turned), "fastconv_native: filters are for forwards that are not turned");
  by_dtype(x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const Conv3x3Pass<T> pass = operands.pass<T>();
    STD_TORCH_CHECK(
        !filters || (filters->scalar_type() == ScalarType::Float && filters->is_contiguous() &&
                     filters->numel() == Filters::of<T>(sizes.channels, sizes.out_channels).size()),
        "fastconv_native: filters must come from winograd_filters, for this weight");
    const float* const prepared = filters ? read<float>(*filters) : nullptr;
    filter_fits(sizes, prepared != nullptr) ? conv_by_tiles(pass, prepared) : conv_by_panels(pass);
  });
}

int64_t winograd_filters_size(int64_t channels, int64_t out_channels) {
  if (!pays_prepared(channels, out_channels)) return 0;
  return Filters::of<float>(channels, out_channels).size();  // floats, whatever the weight's dtype
}

void winograd_filters(const Tensor& weight, const Tensor& filters) {
  const Map filter = map_of(weight, "weight");
  STD_TORCH_CHECK(filter.height == 3 && filter.width == 3, "fastconv_native: weight must be [K, C, 3, 3]");
  STD_TORCH_CHECK(
      filters.scalar_type() == ScalarType::Float && filters.is_contiguous() &&
          filters.numel() == winograd_filters_size(filter.channels, filter.batch),
      "fastconv_native: filters must hold as many floats as winograd_filters_size says");
  by_dtype(weight.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const Conv3x3Filter<T> from{read<T>(weight), filter.batch, filter.channels, false};
    transform_filters(from, Filters::of<T>(filter.channels, filter.batch), write<float>(filters));
  });
}

void winograd_weight_grad(const Tensor& grad, const Tensor& x, const Tensor& weight_grad, const Pair& padding) {
  const Conv3x3Sizes sizes = sizes_of_weight_grad(grad, x, weight_grad, padding);
  by_dtype(grad.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    if (count_tiles(sizes) == 0) {
      std::fill_n(write<T>(weight_grad), 9 * sizes.channels * sizes.out_channels, T{});
      return;
    }
    const Conv3x3WeightGrad<T> pass{sizes, read<T>(x), read<T>(grad), write<T>(weight_grad)};
    runs_pay(sizes) ? weight_grad_by_tiles(pass) : weight_grad_by_panels(pass);
  });
}

}  // namespace fastconv
