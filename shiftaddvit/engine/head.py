"""The closing norm, the pooling and the classification head, in float32."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from shiftaddvit.errors import UserError
from shiftaddvit.layers.packed import PackedShiftLinear
from shiftaddvit.layers.shift import ShiftLinear
from shiftaddvit.ops.layer_norm import layer_norm
from shiftaddvit.ops.norm_linear import norm_linear

from .program import About, Launch
from .weights import Norm, Preparation, matrix

Pool = Literal["token", "avg", "max", "avgmax", "distilled"]


@dataclass(frozen=True)
class HeadStep:
    """Logits of the pooled tokens."""

    name: str
    """Module name in the model."""
    norm: Norm | None
    """Before pooling."""
    pool: Pool
    """`distilled` reads the class and the distillation token."""
    first: int
    """The first token that an average or maximum looks at."""
    pooled_norm: Norm | None
    """After pooling."""
    weight: Float[Tensor, "K C"] | None
    """float32; None for a model without a head. For `distilled` (K, 2C): both heads, each halved."""
    bias: Float[Tensor, "K"] | None
    """float32."""
    width: int
    """Channels of a token."""
    primitive: str = "mult"
    """What the head's products are."""

    def run(self, x: Float[Tensor, "B N C"], launch: Launch) -> Float[Tensor, "B K"]:
        # Only the tokens that are read are normalised.
        x = x[:, : {"token": 1, "distilled": 2}[self.pool]] if self.pool in ("token", "distilled") else x[:, self.first :]
        if self.fused:
            x = layer_norm(x, *self.norm.pair, self.norm.eps, "mean", launch.pdl, launch.backend)
        else:
            x = x.float()
            x = self._pooled(self.norm.run(x) if self.norm else x)
        x = self.pooled_norm.run(x) if self.pooled_norm else x
        if self.weight is None:
            return x
        if x.is_cuda and launch.backend != "reference":
            return norm_linear(x, self.weight, self.bias, pdl=launch.pdl, backend=launch.backend)[0]
        return F.linear(x, self.weight, self.bias)

    @property
    def fused(self) -> bool:
        """Whether norm and pooling are one kernel; a class token is the mean of one."""
        return self.norm is not None and self.pool in ("avg", "token")

    def _pooled(self, x: Tensor) -> Tensor:
        if self.pool == "avg":
            return x.mean(dim=1)
        if self.pool == "max":
            return x.amax(dim=1)
        if self.pool == "avgmax":
            return (x.amax(dim=1) + x.mean(dim=1)) / 2
        return x.flatten(1)

    def about(self) -> About:
        ops = " + ".join([*(["layer_norm"] if self.norm or self.pooled_norm else []), self.pool, "linear"])
        return About(ops, f"{self.outputs}", self.primitive, self.fused)

    @property
    def outputs(self) -> int:
        return self.width if self.weight is None else self.weight.shape[0]


def lower_head(
    head: nn.Module,
    name: str,
    norm: Norm | None,
    pool: Pool,
    first: int,
    width: int,
    prep: Preparation,
    pooled_norm: Norm | None = None,
    second: nn.Module | None = None,
) -> HeadStep:
    """`second` is the distillation token's head. UserError for a head that is no linear layer, or an unknown pooling."""
    if pool not in ("token", "avg", "max", "avgmax", "distilled"):
        raise UserError(f"the engine cannot lower a model with global_pool = {pool!r}: allowed: avg, avgmax, max, token")
    if isinstance(head, nn.Identity) and (second is None or isinstance(second, nn.Identity)):
        if pool != "distilled":
            return HeadStep(name, norm, pool, first, pooled_norm, None, None, width)
        half = torch.eye(width) / 2
        return HeadStep(name, norm, pool, first, pooled_norm, prep.vector(torch.cat([half, half], dim=1)), None, width)
    weight, bias, primitive = _classifier(head, name)
    if second is not None:
        other, other_bias, _ = _classifier(second, name)
        weight = torch.cat([weight, other], dim=1) / 2
        bias = (bias + other_bias) / 2 if bias is not None else None
    return HeadStep(name, norm, pool, first, pooled_norm, prep.vector(weight), prep.vector(bias), width, primitive)


def _classifier(head: nn.Module, name: str) -> tuple[Tensor, Tensor | None, str]:
    if not isinstance(head, (nn.Linear, ShiftLinear, PackedShiftLinear)):
        raise UserError(f"the engine cannot lower {name} ({type(head).__name__}): the classification head must be Linear or a shift layer")
    weight, bias, rounds, primitive = matrix(head, name)
    if rounds:
        raise UserError(f"the engine cannot lower {name}: its inputs are rounded to fixed point; set shift.fixed_point = false or run the model")
    return weight, bias, primitive
