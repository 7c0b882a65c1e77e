"""Launches: forward is logits, then the experts' products; backward is gradients of logits, then of rows, then of weights."""

import torch
from torch import Tensor

from ..moe_linear import triton as experts
from ..tiling import Tile, key, next_power, pick, precision, processors
from .kernels import route_kernel, steps_kernel, weight_grad_kernel


def forward(x: Tensor, router: Tensor, noise: Tensor | None, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """x (M, K), router (2, K), noise (M, 2), weight (2, N, K), bias (2, N): output, logits, expert."""
    m, k = x.shape
    clean = torch.empty(m, 2, dtype=torch.float32, device=x.device)
    index = torch.empty(m, dtype=torch.int8, device=x.device)
    if m:
        block = 128
        route_kernel[(-(-m // block),)](
            x, router, noise, clean, index, m, k, x.stride(0), HAS_NOISE=noise is not None, BM=block, BK=min(64, next_power(k)), num_warps=4
        )
    return _products(x, index, weight, bias), clean, index


def backward(
    grad: Tensor, grad_clean: Tensor, x: Tensor, y: Tensor, clean: Tensor, index: Tensor, router: Tensor, noise: Tensor | None, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradient of x, and those of weight, bias and router one behind the other."""
    m, n = len(x), weight.shape[1]
    steps = torch.empty(m, 2, dtype=torch.float32, device=x.device)
    if m:
        block = 64
        steps_kernel[(-(-m // block),)](
            grad, y, grad_clean, clean, noise, index, steps, m, n, grad.stride(0), HAS_NOISE=noise is not None, BM=block, BN=min(64, next_power(n)),
            STAGES=1 if n <= 64 else 2, num_warps=4,
        )  # fmt: skip
    to_x = _products(grad.to(x.dtype), index, weight.transpose(1, 2).contiguous(), None, (steps, router))
    return to_x, weight_grads(grad, x, index, steps)


def weight_grads(grad: Tensor, x: Tensor, index: Tensor, steps: Tensor) -> Tensor:
    """The gradients of weights, biases and router one behind the other, in float32: sums of parts of the rows, added in order."""
    (m, k), n = x.shape, grad.shape[1]
    size = 2 * n * k + 2 * n + 2 * k
    if m == 0:
        return torch.zeros(size, dtype=torch.float32, device=x.device)
    tile = weight_tile(m, n, k, x.dtype, x.device)
    tiles = -(-n // tile.n) * -(-k // tile.k)
    parts = max(1, min(4 * processors(x.device) // tiles, -(-m // (4 * tile.m))))
    rows = -(-m // (parts * tile.m)) * tile.m
    parts = -(-m // rows)
    out = torch.empty(parts, size, dtype=torch.float32, device=x.device)
    weight_grad_kernel[(tiles * parts,)](
        grad, x, index, steps, out, m, n, k, grad.stride(0), x.stride(0), rows, PRECISION="tf32x3" if x.dtype == torch.float32 else "tf32",
        BM=tile.m, BN=tile.n, BK=tile.k, STAGES=tile.stages, num_warps=tile.warps,
    )  # fmt: skip
    return out.sum(0)


def weight_tile(m: int, n: int, k: int, dtype: torch.dtype, device: torch.device) -> Tile:
    """`m` rows at a time of `n` × `k` weights."""
    usual = Tile(32, min(64, next_power(n)), min(64, next_power(k)), 4, 3)
    return pick(device, key("moe_weight_grad" + precision(dtype), m, n, k), usual, m=(32, 128), n=(16, 128), k=(16, 128), warps=(4, 8), stages=(1, 4))


def _products(x: Tensor, index: Tensor, weight: Tensor, bias: Tensor | None, extra: tuple[Tensor, Tensor] | None = None) -> Tensor:
    if experts.prefer_partition(len(x), *weight.shape[1:]):
        _, order, firsts = experts.order_rows(x, index, None)
        return experts.partition(x, order, firsts, None, weight, bias, extra)
    return experts.dual(x, index, None, weight, bias, extra)
