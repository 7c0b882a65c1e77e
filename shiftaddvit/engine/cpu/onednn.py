"""What oneDNN, as torch ships it, offers here without a compiler; asked once, by running it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class OneDNN:
    """The parts of oneDNN in use."""

    convolutions: bool
    """Convolutions over tokens as they lie, with prepared weights."""
    blocked: bool
    """Chains that stay in oneDNN's own layout."""
    integers: bool
    """Linears of eight-bit operands, exact for |weight| ≤ 64 whatever the processor."""
    linears: bool
    """Linears with prepared weights that take bias and residual along, where they beat MKL."""
    bfloat16: bool
    """All of this but the blocked chains in bfloat16, multiplied by the processor itself rather than emulated."""

    def __str__(self) -> str:
        parts = {
            "convolutions": self.convolutions, "blocked chains": self.blocked, "8-bit linears": self.integers,
            "prepared linears": self.linears, "bfloat16": self.bfloat16,
        }  # fmt: skip
        missing = [name for name, there in parts.items() if not there]
        return f"oneDNN without {', '.join(missing)}: torch's own in their place" if missing else "oneDNN"


NONE = OneDNN(False, False, False, False, False)


@cache
def onednn() -> OneDNN:
    """What works on this processor and with this torch, compared with torch's own results."""
    if not torch.backends.mkldnn.is_available():
        return NONE
    # With AVX2 alone MKL is as fast.
    convolutions, linears = (_works(_try_convolution), torch.backends.cpu.get_cpu_capability() == "AVX512" and _works(_try_linear))
    bfloat16 = convolutions and linears and _multiplies_bfloat16() and _works(_try_bfloat16)
    return OneDNN(convolutions, _works(_try_blocked), _works(_try_integers), linears, bfloat16)


def _multiplies_bfloat16() -> bool:
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


_ROWS = 1024
"""Of inputs for which oneDNN lays out a weight; others run as fast."""


def _works(attempt) -> bool:
    try:
        with torch.no_grad():
            return attempt()
    except (AttributeError, RuntimeError, NotImplementedError):
        # The operators are not part of torch's promised interface: one that is absent or has another signature counts as missing.
        return False


def _try_convolution() -> bool:
    x, weight = (torch.arange(2 * 16 * 3.0).reshape(2, 16, 3) / 16, torch.arange(27.0).reshape(3, 1, 3, 3) / 27)
    y = convolve_tokens(x, (4, 4), packed(weight, (2, 3, 4, 4), 1, (1, 1), 3), None, (1, 1), 1, (1, 1), 3)
    return torch.allclose(y, _plain(x, weight), atol=1e-5)


def _try_linear() -> bool:
    x, weight, bias = (torch.arange(24.0).reshape(3, 8), torch.arange(40.0).reshape(5, 8) / 40, torch.arange(5.0))
    packed_weight, residual = prepared_linear(weight), torch.ones(3, 5)
    plain = F.linear(x, weight, bias)
    return torch.allclose(float_linear(x, packed_weight, bias), plain) and torch.allclose(
        float_linear(x, packed_weight, bias, residual), plain + residual
    )


def _try_bfloat16() -> bool:
    # Small integers, which bfloat16 holds exactly; their sum with the bias it does not: rounding comes last.
    x, weight = ((torch.arange(24) % 5 - 2.0).reshape(3, 8).bfloat16(), (torch.arange(40) % 3 - 1.0).reshape(5, 8).bfloat16())
    y = float_linear(x, prepared_linear(weight), torch.full((5,), 2.0**-10).bfloat16(), -F.linear(x, weight))
    filters = packed(torch.ones(3, 1, 3, 3).bfloat16(), (2, 3, 4, 4), 1, (1, 1), 3)
    z = convolve_tokens(torch.ones(2, 16, 3).bfloat16(), (4, 4), filters, torch.ones(3).bfloat16(), (4, 4), 1, (1, 1), 3)
    expected = _plain(torch.ones(2, 16, 3), torch.ones(3, 1, 3, 3)) + 1
    return torch.equal(y.float(), torch.full((3, 5), 2.0**-10)) and torch.equal(z.float(), expected)


def _try_blocked() -> bool:
    x, weight = (torch.arange(2 * 16 * 3.0).reshape(2, 16, 3) / 16, torch.arange(27.0).reshape(3, 1, 3, 3) / 27)
    y = convolve_blocked(to_blocked(x, (4, 4)), weight.to_mkldnn(), None, 1, 3)
    return torch.allclose(tokens_of(F.gelu(y)), F.gelu(_plain(x, weight)), atol=1e-5)


def _try_integers() -> bool:
    # The largest products that eight-bit operands with power-of-two weights can make: a processor that saturates pairs shows it here.
    x, weight = (torch.full((3, 8), 255, dtype=torch.uint8), torch.full((5, 8), 64, dtype=torch.int8))
    y = integer_linear(x, 1.0, prepared_integers(weight), torch.ones(5), torch.zeros(5, dtype=torch.int32), None)
    return torch.equal(y, torch.full((3, 5), 8.0 * 127 * 64))


def _plain(x: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(x.transpose(1, 2).unflatten(2, (4, 4)), weight, padding=1, groups=3).flatten(2).transpose(1, 2)


def packed(weight: Tensor, input_size: Sequence[int], stride: int, padding: tuple[int, int], groups: int) -> Tensor:
    """A convolution's weight in the layout that oneDNN wants for inputs of about this size."""
    return torch.ops.mkldnn._reorder_convolution_weight(weight, list(padding), [stride] * 2, [1, 1], groups, list(input_size))


def convolve_tokens(
    x: Float[Tensor, "B N C"], size: tuple[int, int], weight: Tensor, bias: Tensor | None, grid: tuple[int, int], stride: int,
    padding: tuple[int, int], groups: int,
) -> Float[Tensor, "B M out"]:  # fmt: skip
    """A convolution with a packed weight over tokens of the grid `size`, read and written where they lie."""
    pictures = x.transpose(1, 2).unflatten(2, size)
    y = torch.ops.mkldnn._convolution_pointwise(pictures, weight, bias, list(padding), [stride] * 2, [1, 1], groups, "none", [], "")
    return y.permute(0, 2, 3, 1).flatten(1, 2)


def to_blocked(x: Float[Tensor, "B N C"], size: tuple[int, int]) -> Tensor:
    """Tokens as an opaque picture of oneDNN's, whose own transposition is several times as fast as torch's."""
    return x.unflatten(1, size).contiguous().to_mkldnn().transpose(2, 3).transpose(1, 2)


def tokens_of(x: Tensor) -> Float[Tensor, "B N C"]:
    """An opaque picture as tokens, contiguous."""
    return x.transpose(1, 2).transpose(2, 3).to_dense().flatten(1, 2)


def convolve_blocked(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int, groups: int) -> Tensor:
    """A convolution of stride 1 from an opaque picture to another."""
    return torch.ops.aten.mkldnn_convolution(x, weight, bias, [padding] * 2, [1, 1], [1, 1], groups)


def prepared_linear(weight: Float[Tensor, "out in"]) -> Tensor:
    """A linear's weight in oneDNN's layout."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS)


def float_linear(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None) -> Float[Tensor, "M out"]:
    """x Wᵀ + bias [+ residual] with a prepared weight, all in the dtype of x, rounded once."""
    if residual is None:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return torch.ops.mkldnn._linear_pointwise.binary(x, residual, weight, bias, "add")


def prepared_integers(weight: Tensor) -> Tensor:
    """int8 (out, in) in oneDNN's layout."""
    return torch.ops.onednn.qlinear_prepack(weight, None)


def integer_linear(
    x: Tensor, scale: float, weight: Tensor, weight_scale: Tensor, zeros: Tensor, bias: Tensor | None, gelu: bool = False
) -> Float[Tensor, "M out"]:
    """act((x − 128) Wᵀ · scale · weight_scale + bias) for uint8 x, the integer product exact."""
    post, algorithm = ("gelu", "none") if gelu else ("none", "")
    return torch.ops.onednn.qlinear_pointwise(
        x, scale, 128, weight, weight_scale, zeros, bias, 1.0, 0, torch.float32, post, [], algorithm
    )  # fmt: skip
