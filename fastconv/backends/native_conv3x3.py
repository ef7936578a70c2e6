"""3×3 convolutions of stride 1: launchers of operators that take the same, Winograd's and AMX's."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from fastconv.backends.native_library import dense, empty, kernel
from fastconv.geometry import ConvGeometry, PoolGeometry


class Conv3x3:
    """Launches `<algorithm>_conv2d` and `<algorithm>_weight_grad`."""

    def __init__(self, algorithm: str) -> None:
        self.algorithm = algorithm
        self.takes_filters = algorithm == "winograd"  # a weight transformed beforehand, for forwards

    def conv2d(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        g: ConvGeometry,
        relu: bool,
        prepared: Tensor | None = None,
    ) -> Tensor:
        output = empty(x, g.output_shape)
        residual = None if residual is None else dense(residual)
        self._forward(x, weight, bias, residual, output, None, g, relu, prepared)
        return output

    def conv2d_relu_max_pool2d(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        g: ConvGeometry,
        pool: PoolGeometry,
        prepared: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Winners are those of the float32 sums, before they are rounded."""
        output, code = empty(x, pool.output_shape), empty(x, pool.output_shape, pool.code_dtype)
        self._forward(x, weight, bias, None, output, code, g, True, prepared)
        return output, code

    def _forward(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        output: Tensor,
        code: Tensor | None,
        g: ConvGeometry,
        relu: bool,
        prepared: Tensor | None,
    ) -> None:
        bias = None if bias is None else bias.contiguous()
        filters = (prepared,) if self.takes_filters else ()
        operands = (dense(x), dense(weight), bias, residual, output, code)
        self._kernel("conv2d")(*operands, (g.out_height, g.out_width), g.padding, relu, False, *filters)

    def conv2d_input_grad(self, grad: Tensor, weight: Tensor, g: ConvGeometry) -> Tensor:
        input_grad = empty(grad, g.input_shape)
        padding = (2 - g.pad_h, 2 - g.pad_w)
        operands = (dense(grad), dense(weight), None, None, input_grad, None)
        self._kernel("conv2d")(*operands, (g.height, g.width), padding, False, True)
        return input_grad

    def conv2d_weight_grad(self, grad: Tensor, x: Tensor, g: ConvGeometry) -> Tensor:
        weight_grad = empty(grad, g.weight_shape)
        self._kernel("weight_grad")(dense(grad), dense(x), weight_grad, g.padding)
        return weight_grad

    def _kernel(self, direction: str) -> Callable[..., Tensor]:
        return kernel(f"{self.algorithm}_{direction}")
