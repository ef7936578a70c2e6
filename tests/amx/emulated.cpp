// The kernels for AMX on emulated tiles, and ways to misuse these; see tests/test_amx.py.
#include "torch/csrc/stable/ops.h"

#include <cstdio>
#include <cstdlib>
#include <new>
#include "../../csrc/cpu/conv/amx_kernels.cpp"

using namespace fastconv;

// Scratch memory is full of NaN, so that an element that nobody wrote shows.
void* operator new(std::size_t size, std::align_val_t alignment) {
  const std::size_t line = static_cast<std::size_t>(alignment), whole = (size + line - 1) / line * line;
  void* const memory = std::aligned_alloc(line, whole);
  return memory == nullptr ? nullptr : __builtin_memset(memory, 0xff, whole);
}
void operator delete(void* memory, std::align_val_t) noexcept { std::free(memory); }

// sizes: batch, height, width, channels, out_height, out_width, out_channels, pad_h, pad_w
static Conv3x3Sizes sizes_of(const int64_t* s) { return {s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7], s[8]}; }

extern "C" {

void conv(
    const BFloat16* x, const BFloat16* weight, const BFloat16* bias, const BFloat16* residual, BFloat16* y, uint8_t* code,
    const int64_t* sizes, int64_t pooled_height, int64_t pooled_width, int relu, int turned, int64_t threads) {
  torch::stable::thread_count() = threads;
  const Conv3x3Sizes s = sizes_of(sizes);
  const Conv3x3Filter<BFloat16> filter{
      weight, turned ? s.channels : s.out_channels, turned ? s.out_channels : s.channels, turned != 0};
  amx::conv({s, x, filter, {y, code, bias, residual, relu != 0, pooled_height, pooled_width}});
}

void weight_grad(const BFloat16* grad, const BFloat16* x, BFloat16* weight_grad, const int64_t* sizes, int64_t threads) {
  torch::stable::thread_count() = threads;
  amx::weight_grad({sizes_of(sizes), x, grad, weight_grad});
}

// to[16, 16] += a[16, 32] · b[16, 16, 2]
void product(const BFloat16* a, const BFloat16* b, float* to) {
  const amx::TilesInUse use;
  amx::load_tile<0>(to, 64);
  amx::load_tile<1>(a, 64);
  amx::load_tile<2>(b, 64);
  amx::multiply_tiles<0, 1, 2>();
  amx::store_tile<0>(to, 64);
}

void misuse(const char* how) {
  const auto is = [&](const char* name) { return __builtin_strcmp(how, name) == 0; };
  amx::TileConfig config;
  if (is("use before configuration")) amx::zero_tile<0>();
  if (is("use after release")) {
    { const amx::TilesInUse use; }
    amx::zero_tile<3>();
  }
  if (is("configured twice")) {
    const amx::TilesInUse use, again;
  }
  if (is("rows")) config.rows[2] = 17;
  if (is("columns")) config.row_bytes[7] = 68;
  if (is("palette")) config.palette = 0;
  if (is("reserved")) config.reserved[5] = 1;
  if (is("missing")) config.rows[1] = config.row_bytes[1] = 0;
  if (is("fit")) config.rows[1] = 8;
  amx::configure_tiles(config);
  amx::multiply_tiles<0, 1, 2>();
  std::exit(0);
}
}

#if defined(FASTCONV_AMX_MAIN)
#include <vector>

// For sanitizers: every kernel on the sizes of standard input, each array exactly as large as it must be.
int main() {
  int64_t s[9];
  const auto random = [](int64_t count) {
    std::vector<BFloat16> values(count);
    for (BFloat16& value : values) value = round_to<BFloat16>(static_cast<float>(std::rand() % 2001 - 1000) / 500.0f);
    return values;
  };
  while (true) {
    for (int64_t& size : s) {
      if (std::scanf("%ld", &size) != 1) return 0;
    }
    const int64_t inputs = s[0] * s[1] * s[2] * s[3], outputs = s[0] * s[4] * s[5] * s[6];
    const auto x = random(inputs), weight = random(9 * s[3] * s[6]), bias = random(s[6]), grad = random(outputs);
    std::vector<BFloat16> y(outputs), input_grad(inputs), weight_gradient(weight.size());
    conv(x.data(), weight.data(), bias.data(), grad.data(), y.data(), nullptr, s, s[4], s[5], 1, 0, 2);
    for (int64_t up = 0; up < 2; ++up) {
      const int64_t height = (s[4] + up) / 2, width = (s[5] + up) / 2;
      if (height == 0 || width == 0) continue;
      std::vector<uint8_t> code(s[0] * height * width * s[6]);
      std::vector<BFloat16> pooled(code.size());
      conv(x.data(), weight.data(), bias.data(), nullptr, pooled.data(), code.data(), s, height, width, 1, 0, 2);
    }
    const int64_t back[9] = {s[0], s[4], s[5], s[6], s[1], s[2], s[3], 2 - s[7], 2 - s[8]};
    conv(grad.data(), weight.data(), nullptr, nullptr, input_grad.data(), nullptr, back, s[1], s[2], 0, 1, 2);
    weight_grad(grad.data(), x.data(), weight_gradient.data(), s, 2);
  }
}
#endif
