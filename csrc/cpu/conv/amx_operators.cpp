// The operators on AMX, and whether this process may run them.
#include "../operators.h"
#include "../tensors.h"
#include "amx.h"

#if FASTCONV_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastconv {

namespace {

#if FASTCONV_AMX
bool processor_has_amx() {
  unsigned a, b, c, d;
  constexpr unsigned kAvx512Bf16 = 1u << 5, kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a & kAvx512Bf16)) return false;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kAmxBf16) && (d & kAmxTile);
}

// Linux lets a process use tiles once it has asked; the answer holds for all of its threads.
bool kernel_grants_tiles() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

void check_amx(const Tensor& x) {
  STD_TORCH_CHECK(has_amx(), "fastconv_native: this process has no AMX");
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::BFloat16, "fastconv_native: AMX multiplies bfloat16 only");
}

}  // namespace

bool built_with_amx() { return FASTCONV_AMX; }

bool has_amx() {
#if FASTCONV_AMX
  static const bool granted =
      instruction_set() == InstructionSet::kAvx512 && processor_has_amx() && kernel_grants_tiles();
  return granted;
#else
  return false;
#endif
}

void amx_conv2d(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
    const Tensor& output, const std::optional<Tensor>& code, const Pair& size, const Pair& padding, bool relu, bool turned) {
  const Map from = map_of(x, "x"), filter = map_of(weight, "weight"), to = map_of(output, "output");
  constexpr auto dtype = ScalarType::BFloat16;
  const int64_t reduction = turned ? filter.batch : filter.channels, outputs = turned ? filter.channels : filter.batch;
  check_same(weight, "weight", filter, dtype);
  check_same(output, "output", to, dtype);
  if (code) check_same(*code, "code", to, ScalarType::Byte);
  if (residual) check_same(*residual, "residual", to, dtype);
  if (bias) {
    STD_TORCH_CHECK(
        bias->dim() == 1 && bias->size(0) == outputs && bias->is_contiguous() && bias->scalar_type() == dtype,
        "fastconv_native: bias must hold one bfloat16 for each output channel");
  }
  STD_TORCH_CHECK(!code || (!residual && relu), "fastconv_native: a pool comes with ReLU and without a residual");
  STD_TORCH_CHECK(
      filter.height == 3 && filter.width == 3 && reduction == from.channels && outputs == to.channels,
      "fastconv_native: weight must be [K, C, 3, 3] of the channels of x and output");
  const auto fits = [&](int64_t in, int64_t out, int64_t written, int64_t pad) {
    return pad >= 0 && pad <= 2 && out == in + 2 * pad - 2 && out > 0 &&
           (code ? written == out / 2 || written == (out + 1) / 2 : written == out);
  };
  STD_TORCH_CHECK(
      from.batch == to.batch && fits(from.height, size[0], to.height, padding[0]) &&
          fits(from.width, size[1], to.width, padding[1]),
      "fastconv_native: output has a wrong size, or padding is not 0, 1 or 2");
  check_amx(x);
#if FASTCONV_AMX
  amx::conv(
      {{from.batch, from.height, from.width, from.channels, size[0], size[1], outputs, padding[0], padding[1]},
       read<BFloat16>(x),
       {read<BFloat16>(weight), filter.batch, filter.channels, turned},
       {write<BFloat16>(output), code ? write<uint8_t>(*code) : nullptr, bias ? read<BFloat16>(*bias) : nullptr,
        residual ? read<BFloat16>(*residual) : nullptr, relu, to.height, to.width}});
#endif
}

void amx_weight_grad(const Tensor& grad, const Tensor& x, const Tensor& weight_grad, const Pair& padding) {
  const Map to = map_of(grad, "grad"), from = map_of(x, "x"), filter = map_of(weight_grad, "weight_grad");
  check_same(x, "x", from, grad.scalar_type());
  check_same(weight_grad, "weight_grad", filter, grad.scalar_type());
  STD_TORCH_CHECK(
      filter.height == 3 && filter.width == 3 && filter.batch == to.channels && filter.channels == from.channels,
      "fastconv_native: weight_grad must be [K, C, 3, 3] of the channels of grad and x");
  const auto fits = [&](int64_t in, int64_t out, int64_t pad) { return pad >= 0 && pad <= 2 && out == in + 2 * pad - 2; };
  STD_TORCH_CHECK(
      from.batch == to.batch && fits(from.height, to.height, padding[0]) && fits(from.width, to.width, padding[1]),
      "fastconv_native: grad has a wrong size, or padding is not 0, 1 or 2");
  check_amx(x);
#if FASTCONV_AMX
  amx::weight_grad(
      {{from.batch, from.height, from.width, from.channels, to.height, to.width, to.channels, padding[0], padding[1]},
       read<BFloat16>(x),
       read<BFloat16>(grad),
       write<BFloat16>(weight_grad)});
#endif
}

}  // namespace fastconv
