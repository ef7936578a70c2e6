// How AMX's convolutions are shared among threads. Which sums are formed, and in which order, depends on sizes only.
#include "amx.h"

#if FASTCONV_AMX
#include "../memory.h"
#include "../parallel.h"

namespace fastconv::amx {

namespace {

// Floats that hold so many bfloat16, up to a cache line's end.
int64_t floats(int64_t elements) { return ceil_div(elements, kBlock) * (kBlock / 2); }

BFloat16* elements(float* memory) { return reinterpret_cast<BFloat16*>(memory); }

// On maps up to here, tiles of rows would be half empty.
constexpr int64_t kSmall = 8;
// Weight gradients: input and output channels whose sums each run may have for its own.
constexpr int64_t kOwnSums = 1 << 15;
constexpr int64_t kTooSmallToShift = 7;

void conv_by_bands(const Pass& pass, const BFloat16* filters) {
  const Bands plan = Bands::of(pass);
  const int64_t copy = floats(plan.copy(pass.sizes)), memory = copy + plan.sums();
  const Workers workers(pass.sizes.batch * plan.count * plan.groups);
  const Scratch scratch(workers.count() * memory);
  workers.run([&](int64_t unit, int64_t worker) {
    float* const own = scratch.at(worker * memory);
    conv_band(pass, plan, unit, filters, elements(own), own + copy);
  });
}

void conv_by_gathering(const Pass& pass, const BFloat16* filters) {
  const Gathers plan = Gathers::of(pass);
  const int64_t left = floats(plan.gathered(pass.sizes)), memory = left + plan.sums();
  const Workers workers(plan.chunks * plan.groups);
  const Scratch scratch(workers.count() * memory);
  workers.run([&](int64_t unit, int64_t worker) {
    float* const own = scratch.at(worker * memory);
    conv_gathered(pass, plan, unit, filters, elements(own), own + left);
  });
}

// Chunks of pixels one after the other; in each, units are taps and parts of the input channels.
void weight_grad_by_taps(const WeightGrad& pass) {
  const Conv3x3Sizes& s = pass.sizes;
  const Taps plan = Taps::of(s);
  constexpr int64_t kTurned = 256;  // pixels of a unit
  const Scratch turned_memory(floats(plan.turned(s))), sums(plan.pixels <= plan.chunk ? 0 : gradient_sums(s));
  BFloat16* const turned = elements(turned_memory.at(0));
  const Workers workers(9 * plan.parts);
  const Scratch paired(workers.count() * floats(plan.paired()));
  for (int64_t first = 0; first < plan.pixels; first += plan.chunk) {
    const int64_t pixels = blocks(std::min(plan.chunk, plan.pixels - first)) * kBlock, runs = ceil_div(pixels, kTurned);
    Workers(blocks(s.out_channels) * runs).run([&](int64_t unit, int64_t) {
      const int64_t block = unit / runs, p = unit % runs * kTurned;
      turn_grad(pass, plan, block, first + p, std::min(kTurned, pixels - p), turned + block * kBlock * plan.chunk + p * kBlock);
    });
    workers.run([&](int64_t unit, int64_t worker) {
      BFloat16* const own = elements(paired.at(worker * floats(plan.paired())));
      add_tap(pass, plan, unit, first, turned, own, plan.pixels <= plan.chunk ? nullptr : sums.at(0));
    });
  }
}

// Runs of pieces at the same time, each with sums of its own, which are then added in order.
void weight_grad_by_shifts(const WeightGrad& pass) {
  const Conv3x3Sizes& s = pass.sizes;
  const Shifts plan = Shifts::of(s);
  const Scratch sums(plan.runs * gradient_sums(s));
  const Workers workers(plan.runs);
  const int64_t turned = floats(plan.together * plan.turned(s)), memory = turned + floats(plan.together * plan.paired(s));
  const Scratch scratch(workers.count() * memory);
  workers.run([&](int64_t run, int64_t worker) {
    float* const own = scratch.at(worker * memory);
    sum_run(pass, plan, run, elements(own), elements(own + turned), sums.at(run * gradient_sums(s)));
  });
  Workers(s.out_channels).run([&](int64_t k, int64_t) { add_runs(pass, plan, k, sums.at(0)); });
}

}  // namespace

void conv(const Pass& pass) {
  const Conv3x3Sizes& s = pass.sizes;
  const Scratch memory(floats(panels(s) * packed_panel(s)));
  BFloat16* const filters = elements(memory.at(0));
  Workers(panels(s) * 9).run([&](int64_t unit, int64_t) {
    pack_filter(pass.filter, unit / 9, unit % 9, filters + unit * blocks(s.channels) * kBlockElements);
  });
  if (s.out_width <= kSmall) return conv_by_gathering(pass, filters);
  conv_by_bands(pass, filters);
}

void weight_grad(const WeightGrad& pass) {
  const Conv3x3Sizes& s = pass.sizes;
  if (s.batch == 0) {
    std::fill_n(pass.weight_grad, s.out_channels * 9 * s.channels, BFloat16{0});
    return;
  }
  if (s.channels * s.out_channels <= kOwnSums && std::min(s.out_height, s.out_width) > kTooSmallToShift) {
    return weight_grad_by_shifts(pass);
  }
  weight_grad_by_taps(pass);
}

}  // namespace fastconv::amx

#endif
