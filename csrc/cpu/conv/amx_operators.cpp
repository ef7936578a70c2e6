// The operators on AMX, and whether this process may run them.
#include "amx.h"
#include "conv3x3_operands.h"

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
  const Conv3x3Operands operands(x, weight, bias, residual, output, code, size, padding, relu, turned);
  check_amx(x);
#if FASTCONV_AMX
  amx::conv(operands.pass<BFloat16>());
#endif
}

void amx_weight_grad(const Tensor& grad, const Tensor& x, const Tensor& weight_grad, const Pair& padding) {
  const Conv3x3Sizes sizes = sizes_of_weight_grad(grad, x, weight_grad, padding);
  check_amx(x);
#if FASTCONV_AMX
  amx::weight_grad({sizes, read<BFloat16>(x), read<BFloat16>(grad), write<BFloat16>(weight_grad)});
#endif
}

}  // namespace fastconv
