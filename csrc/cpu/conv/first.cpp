// How a first layer's convolution is cut into units of work: strips of an image's rows.
#include "../operators.h"
#include "../memory.h"
#include "../parallel.h"
#include "../tensors.h"
#include "dispatch.h"

namespace fastconv {

namespace {

struct Strips {
  FirstSizes sizes;
  int64_t rows, of_image;

  // Of an even number of rows, which a pool needs.
  static Strips of(const FirstSizes& s, int64_t most_rows) {
    const int64_t most = std::max<int64_t>(2, most_rows);
    const int64_t rows = (ceil_div(s.out_height, ceil_div(s.out_height, most)) + 1) / 2 * 2;
    return {s, std::min(rows, s.out_height), ceil_div(s.out_height, rows)};
  }
  int64_t count() const { return sizes.batch * of_image; }
  Strip at(int64_t index) const {
    const int64_t row = index % of_image * rows;
    return {index / of_image, row, std::min(rows, sizes.out_height - row)};
  }
};

// Packs weights [K, KH, run], with zeros for what fills panels and lanes up. Returns whether all are finite.
template <class T>
bool pack(const T* weight, const FirstSizes& s, const FirstKernels<T>& k, float* packed) {
  constexpr uint32_t kExponent = 0x7f800000u;
  const int64_t run = s.run(), steps = ceil_div(run, k.step);
  bool finite = true;
  std::fill_n(packed, k.panels(s) * k.packed(s), 0.0f);
  for (int64_t output = 0; output < s.out_channels; ++output) {
    float* const to = packed + output / k.panel * k.packed(s) + output % k.panel;
    for (int64_t t = 0; t < s.taps(); ++t) {
      const uint32_t bits = bits_of(load(weight[output * s.taps() + t]));
      const int64_t element = t % run;
      float& lane = to[(t / run * steps + element / k.step) * k.panel];
      finite &= (bits & kExponent) != kExponent;
      if (k.step == 1) {
        lane = float_of(bits);
      } else {
        lane = float_of(bits_of(lane) | (element % 2 == 0 ? bits >> 16 : bits));
      }
    }
  }
  return finite;
}

template <class T>
void conv(FirstPass<T> pass, const T* weight) {
  const FirstKernels<T>& k = first_kernels<T>();
  const FirstSizes& s = pass.sizes;
  const Scratch filter(k.panels(s) * k.packed(s));
  pass.filter = filter.at(0);
  pass.finite = pack(weight, s, k, filter.at(0));
  constexpr int64_t kRows = 4;  // a strip reads KH - stride more rows of the image than its own, which the next one reads again
  const Strips strips = Strips::of(s, kRows);
  const int64_t size = ceil_div(k.forward_memory(s, strips.rows), 16) * 16;
  const Workers workers(strips.count());
  const Scratch memory(workers.count() * size);
  workers.run([&](int64_t unit, int64_t worker) { k.forward(pass, strips.at(unit), memory.at(worker * size)); });
}

// Each run sums its strips into a set of its own. The number of runs depends on sizes only.
template <class T>
void weight_grad(const FirstWeightGrad<T>& pass) {
  constexpr int64_t kSums = int64_t{1} << 20, kLeastRuns = 8, kMostRuns = 64;
  constexpr int64_t kBlock = 128, kPixels = 192;  // a panel's gradient of so many pixels stays in the first cache
  const FirstKernels<T>& k = first_kernels<T>();
  const FirstSizes& s = pass.sizes;
  const Strips strips = Strips::of(s, kPixels / std::min(kBlock, s.out_width));
  const int64_t set = k.panels(s) * (s.taps() + 1) * k.panel + 16;
  const int64_t runs = std::min(strips.count(), std::clamp(kSums / set, kLeastRuns, kMostRuns));
  const Scratch sums(runs * set);
  const int64_t size = ceil_div(k.grad_memory(s, strips.rows, std::min(kBlock, s.out_width)), 16) * 16;
  const Workers workers(runs);
  const Scratch memory(workers.count() * size);
  workers.run([&](int64_t run, int64_t worker) {
    std::fill_n(sums.at(run * set), set, 0.0f);
    for (int64_t strip = strips.count() * run / runs; strip < strips.count() * (run + 1) / runs; ++strip) {
      k.weight_grad(pass, strips.at(strip), kBlock, sums.at(run * set), memory.at(worker * size));
    }
  });
  constexpr int64_t kTaps = 32;
  const int64_t parts = ceil_div(s.taps() + 1, kTaps);
  Workers(k.panels(s) * parts).run([&](int64_t unit, int64_t) {
    const int64_t t0 = unit % parts * kTaps;
    k.finish(pass, unit / parts, t0, std::min(s.taps() + 1, t0 + kTaps), sums.at(0), runs, set);
  });
}

FirstSizes sizes_of(
    const Map& x, const Map& filter, const Map& to, bool pooled, const Pair& size, const Pair& stride, const Pair& padding) {
  const FirstSizes s{x.batch,       x.height,     x.width,   x.channels, size[0],    size[1],   filter.batch,
                     filter.height, filter.width, stride[0], stride[1],  padding[0], padding[1]};
  STD_TORCH_CHECK(
      filter.channels == x.channels && to.batch == x.batch && to.channels == filter.batch,
      "fastconv_native: weight must be [K, C, KH, KW] of the channels of x and output");
  const auto fits = [](int64_t out, int64_t kernel, int64_t step, int64_t pad, int64_t map) {
    return out > 0 && step > 0 && pad >= 0 && (out - 1) * step + kernel <= map + 2 * pad;
  };
  STD_TORCH_CHECK(
      fits(s.out_height, s.kernel_h, s.stride_h, s.pad_h, x.height) && fits(s.out_width, s.kernel_w, s.stride_w, s.pad_w, x.width),
      "fastconv_native: size must be that of the convolution's output");
  STD_TORCH_CHECK(
      holds(s.out_height, to.height, pooled) && holds(s.out_width, to.width, pooled),
      "fastconv_native: output has a wrong size");
  if (!pooled) return s;
  FirstSizes seen = s;
  seen.out_height = std::min(s.out_height, 2 * to.height);
  seen.out_width = std::min(s.out_width, 2 * to.width);
  return seen;
}

}  // namespace

void first_conv2d(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
    const Tensor& output, const std::optional<Tensor>& code, const Pair& size, const Pair& stride, const Pair& padding,
    bool relu) {
  const Map from = map_of(x, "x"), filter = map_of(weight, "weight"), to = map_of(output, "output");
  const auto dtype = x.scalar_type();
  check_same(weight, "weight", filter, dtype);
  check_same(output, "output", to, dtype);
  check_bias(bias, to, dtype);
  if (code) check_same(*code, "code", to, ScalarType::Byte);
  if (residual) check_same(*residual, "residual", to, dtype);
  STD_TORCH_CHECK(!code || (relu && !residual), "fastconv_native: a pool comes with ReLU and without a residual");
  const FirstSizes sizes = sizes_of(from, filter, to, code.has_value(), size, stride, padding);
  by_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const ConvOutput<T> out{
        write<T>(output), code ? write<uint8_t>(*code) : nullptr, bias ? read<T>(*bias) : nullptr,
        residual ? read<T>(*residual) : nullptr, relu, to.height, to.width};
    conv(FirstPass<T>{sizes, read<T>(x), nullptr, true, out}, read<T>(weight));
  });
}

void first_weight_grad(
    const Tensor& grad, const std::optional<Tensor>& gate, const Tensor& x, const Tensor& weight_grad,
    const std::optional<Tensor>& bias_grad, const Pair& size, const Pair& stride, const Pair& padding) {
  const Map to = map_of(grad, "grad"), from = map_of(x, "x"), filter = map_of(weight_grad, "weight_grad");
  const auto dtype = grad.scalar_type();
  const bool pooled = gate && gate->scalar_type() == ScalarType::Byte;
  check_same(x, "x", from, dtype);
  check_same(weight_grad, "weight_grad", filter, dtype);
  check_bias(bias_grad, to, dtype);
  if (gate) check_same(*gate, "gate", to, pooled ? ScalarType::Byte : dtype);
  const FirstSizes sizes = sizes_of(from, filter, to, pooled, size, stride, padding);
  by_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if (to.numel() == 0) {
      std::fill_n(write<T>(weight_grad), filter.numel(), T{});
      if (bias_grad) std::fill_n(write<T>(*bias_grad), to.channels, T{});
      return;
    }
    fastconv::weight_grad(FirstWeightGrad<T>{
        sizes, read<T>(x), read<T>(grad), gate && !pooled ? read<T>(*gate) : nullptr,
        pooled ? read<uint8_t>(*gate) : nullptr, write<T>(weight_grad), bias_grad ? write<T>(*bias_grad) : nullptr, to.height,
        to.width});
  });
}

}  // namespace fastconv
