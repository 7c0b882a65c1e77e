"""The view transformer's attention multiplied out for rendering, and the first layers cut to what the kernels read.

Published: logits = A₂ relu(A₁ (k − q + p) + a) with k = K x, q = Q LN(y), p = P₂ r + b, r = relu(P₁ d + c), and the values are V k + p.
Everything before the ReLU is linear, so A₁ K, A₁ Q and A₁ P₂ replace K, Q and P₂ there: 8 channels instead of 64. V K is one matrix. A
constant added to all views' logits changes no softmax, and a constant added to all values passes through it, so A₂'s bias is dropped and
P₂'s is carried to the output's. For a point and view this is 5,700 multiplications instead of 9,800 at width 64.
"""

import torch
from torch import Tensor, nn

from shiftaddvit.engine.weights import Preparation, Projection, projection

from ..gnt.transformer import LINEARS, ViewAttention

UNITS = 16


def fold(attention: ViewAttention, name: str, prep: Preparation) -> dict[str, Tensor] | None:
    """The weights that `view_attention` takes, by argument; None where a linear is a mixture or rounds its input (nothing to multiply
    out)."""
    exact = Preparation(torch.float32, prep.device)
    parts = [projection(getattr(attention, linear), f"{name}.{linear}", exact) for linear in LINEARS]
    if any(not single(part) for part in parts):
        return None
    q, k, v, out = (part.weight[0].double() for part in parts)
    bias = parts[-1].bias[0].double() if parts[-1].bias is not None else out.new_zeros(len(out))
    (near, near_bias), (pos, pos_bias) = (_wide(attention.pos_fc[number], prep) for number in (0, 2))
    (hidden, hidden_bias), (logits, _) = (_wide(attention.attn_fc[number], prep) for number in (0, 2))
    matrices = {
        "query_weight": padded(hidden @ q, UNITS), "key_weight": padded(hidden @ k, UNITS), "near_weight": padded(hidden @ pos, UNITS, UNITS),
        "pos_weight": padded(near, UNITS, 8), "logit_weight": padded(logits, len(logits), UNITS), "value_weight": v @ k,
        "pos_value": padded(pos, len(pos), UNITS), "out_weight": out,
    }  # fmt: skip
    vectors = {"hidden_bias": padded(hidden_bias + hidden @ pos_bias, UNITS), "pos_bias": padded(near_bias, UNITS), "out_bias": bias + out @ pos_bias}
    return {key: prep.matrix(value, f"{name}.{key}") for key, value in matrices.items()} | {key: prep.vector(value) for key, value in vectors.items()}


def single(part: Projection) -> bool:
    """Whether a projection is one matrix on what it is given."""
    return part.fusable and part.router is None


def padded(tensor: Tensor, *sizes: int) -> Tensor:
    """Zeros appended until the leading dimensions have these sizes."""
    for dim, size in enumerate(sizes):
        missing = size - tensor.shape[dim]
        if missing:
            shape = [*tensor.shape[:dim], missing, *tensor.shape[dim + 1 :]]
            tensor = torch.cat([tensor, tensor.new_zeros(shape)], dim=dim)
    return tensor


def _wide(linear: nn.Linear, prep: Preparation) -> tuple[Tensor, Tensor]:
    return linear.weight.detach().to(prep.device).double(), linear.bias.detach().to(prep.device).double()
