"""The MLP from its parts' references, in float32 or float64, rounded where their results would be written."""

from torch import Tensor

from ..conv_gelu import reference as conv_gelu
from ..norm_linear import reference as norm_linear


def conv_mlp(
    x: Tensor, height: int, width: int, eps: float, gamma: Tensor, beta: Tensor, weight1: Tensor, bias1: Tensor, router1: Tensor | None,
    conv: Tensor, conv_bias: Tensor, weight2: Tensor, bias2: Tensor, router2: Tensor | None,
) -> Tensor:  # fmt: skip
    """x + fc2(GELU(conv3×3(fc1(LayerNorm(x)))))."""
    rows = x.reshape(-1, x.shape[2])
    h, _ = norm_linear.norm_linear(rows, gamma, beta, eps, weight1, bias1, router1, None, None, "none")
    h = h.to(conv.dtype).reshape(*x.shape[:2], weight1.shape[1])
    a = conv_gelu.conv_gelu(h, height, width, conv, conv_bias, None).reshape(len(rows), weight1.shape[1])
    y, _ = norm_linear.norm_linear(a, None, None, 0.0, weight2, bias2, router2, rows, None, "none")
    return y.reshape(x.shape)
