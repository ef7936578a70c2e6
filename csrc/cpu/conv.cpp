// The convolution itself is oneDNN's; residual and ReLU follow in one pass over its output.
#include "operators.h"
#include "tensors.h"

#include <torch/csrc/stable/library.h>

#include <array>

namespace fastconv {

namespace {

template <class T, bool kResidual, bool kRelu>
void finish(T* y, const T* residual, int64_t numel) {
  const Chunks chunks = Chunks::of(numel, 1, numel);
  for_chunks(chunks.count, [=](int64_t first, int64_t last) FASTCONV_INLINE_LAMBDA {
    const int64_t end = chunks.end(last - 1);
    FASTCONV_VECTORIZE
    for (int64_t i = chunks.begin(first); i < end; ++i) {
      float value = load(y[i]);
      if constexpr (kResidual) {
        // Rounded before ReLU, as an addition of tensors is.
        value = load(round_to<T>(value + load(residual[i])));
      }
      if constexpr (kRelu) value = value < 0 ? 0.0f : value;  // NaN stays
      y[i] = narrow<T>(value);
    }
  });
}

}  // namespace

Tensor conv2d(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
    const Pair& stride, const Pair& padding, const Pair& dilation, int64_t groups, bool relu) {
  using torch::stable::detail::from;
  // oneDNN's own ReLU turns NaN into 0, so only the bias is left to it.
  std::array<StableIValue, 9> stack{
      from(x), from(weight), from(bias), from(stride), from(padding), from(dilation), from(false), from(Pair{0, 0}),
      from(groups)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::convolution", "", stack.data(), TORCH_ABI_VERSION));
  Tensor y = torch::stable::contiguous(
      torch::stable::detail::to<Tensor>(stack[0]), torch::headeronly::MemoryFormat::ChannelsLast);
  if (!residual && !relu) return y;

  const Map map = map_of(y, "output");
  if (residual) check_same(*residual, "residual", map, y.scalar_type());
  by_dtype(y.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    T* values = write<T>(y);
    if (!residual) return finish<T, false, true>(values, nullptr, map.numel());
    if (relu) return finish<T, true, true>(values, read<T>(*residual), map.numel());
    return finish<T, true, false>(values, read<T>(*residual), map.numel());
  });
  return y;
}

}  // namespace fastconv
