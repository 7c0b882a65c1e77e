"""MLPs as steps: with a depthwise convolution inside (PVTv2), plain, or a mixture of whole MLPs (PVTv1)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.layers import Mlp
from timm.models.pvt_v2 import MlpWithDepthwiseConv
from torch import Tensor, nn

from shiftaddvit.errors import UserError
from shiftaddvit.layers.moe import MoEMlp
from shiftaddvit.ops.conv_gelu import conv_gelu
from shiftaddvit.ops.conv_mlp import conv_mlp, fits
from shiftaddvit.ops.moe_linear import moe_linear
from shiftaddvit.ops.norm_linear import norm_linear, route_rows

from .adder import lower_projection
from .program import About, Launch
from .weights import Activation, Norm, Preparation, Projection, activate, activation_of, convolution, norm_of, routed

PIECE_BYTES = 224 << 20
"""The hidden tensors before and after a convolution may take about so much memory; larger batches go through in pieces."""

FEWEST_TOKENS = 16384
"""Of fewer, `conv_mlp` is no faster than the three kernels that it stands for: most multiprocessors would be without work, and the others
busy starting a strip."""


@dataclass(frozen=True)
class ConvMlpStep:
    """x + fc2(act(conv3×3(fc1(norm(x)))))."""

    name: str
    """Module name in the model."""
    norm: Norm
    """Before fc1."""
    fc1: Projection
    """To the hidden channels."""
    relu: bool
    """Whether a ReLU stands before the convolution (the linear variant of PVTv2)."""
    grid: tuple[int, int]
    """Of the tokens."""
    conv: Float[Tensor, "9 hidden"]
    """Depthwise filters, one a column."""
    conv_bias: Float[Tensor, "hidden"]
    """float32."""
    activation: Activation
    """After the convolution."""
    fc2: Projection
    """Back."""
    conv_primitive: str = "mult"
    """What the convolution's products are."""

    @property
    def fused(self) -> bool:
        return self.fc2.fusable and self.activation == "gelu"

    def run(self, x: Float[Tensor, "B N C"], launch: Launch) -> Float[Tensor, "B N C"]:
        fits_kernels = self._fits(x, launch)
        # Of 32 channels the hidden tensor is never written, of 64 only behind the convolution.
        tensors = 2 if not fits_kernels else 0 if x.shape[2] == 32 else 1
        image = max(1, tensors * self.grid[0] * self.grid[1] * self.conv.shape[1] * self.conv.element_size())
        # A power of two, so that few shapes of launches come of it.
        most = 1 << max(0, (PIECE_BYTES // image).bit_length() - 1)
        run = self._run_fused if fits_kernels else self._run
        if len(x) <= most:
            return run(x, launch)
        return torch.cat([run(part, launch) for part in x.split(most)])

    def _run_fused(self, x: Float[Tensor, "B N C"], launch: Launch) -> Float[Tensor, "B N C"]:
        fc1, fc2 = ((part.weight, part.bias, part.rows) for part in (self.fc1, self.fc2))
        return conv_mlp(x, *self.grid, self.norm.pair, self.norm.eps, fc1, (self.conv, self.conv_bias), fc2, launch.pdl, launch.backend)

    def _fits(self, x: Float[Tensor, "B N C"], launch: Launch) -> bool:
        """Whether `conv_mlp` has kernels for it."""
        if launch.backend not in ("auto", "triton") or len(x) * x.shape[1] < FEWEST_TOKENS or not self.about().fused:
            return False
        biased = self.fc1.bias is not None and self.fc2.bias is not None and self.conv_bias is not None
        return biased and fits(x, self.grid[1], self.fc1.weight, self.conv, self.fc2.weight)

    def _run(self, x: Float[Tensor, "B N C"], launch: Launch) -> Float[Tensor, "B N C"]:
        h = self.fc1.run(x, launch, self.norm)
        h = (torch.relu(h) if self.relu else h).to(self.conv.dtype)
        if self.activation == "gelu":
            a = conv_gelu(h, *self.grid, self.conv, self.conv_bias, pdl=launch.pdl, backend=launch.backend)
        else:
            a = activate(self._convolve(h), self.activation)
        return self.fc2.run(a, launch, residual=x)

    def _convolve(self, h: Float[Tensor, "B N hidden"]) -> Float[Tensor, "B N hidden"]:
        pictures = h.transpose(1, 2).unflatten(2, self.grid)
        filters = self.conv.t().reshape(-1, 1, 3, 3)
        return F.conv2d(pictures, filters, self.conv_bias.to(h.dtype), padding=1, groups=h.shape[2]).flatten(2).transpose(1, 2)

    def about(self) -> About:
        first = f"{'norm_linear' if self.fc1.fusable else 'norm + linear'} + {'relu + ' if self.relu else ''}"
        ops = f"{first}{'conv_gelu' if self.activation == 'gelu' else 'conv2d + activation'} + {'norm_linear' if self.fc2.fusable else 'linear'}"
        fused = self.fc1.fusable and self.fc2.fusable and self.activation == "gelu" and not self.relu
        return About(ops, f"{self.grid[0] * self.grid[1]}×{self.fc2.weight.shape[1]}", _all(self.fc1.primitive, self.conv_primitive, self.fc2.primitive), fused)


@dataclass(frozen=True)
class MlpStep:
    """x + fc2([norm](act(fc1(norm(x)))))."""

    name: str
    """Module name in the model."""
    tokens: int
    """Of one image."""
    norm: Norm
    """Before fc1."""
    fc1: Projection
    """To the hidden channels."""
    activation: Activation
    """Between the two."""
    inner: Norm | None
    """Of the hidden channels."""
    fc2: Projection
    """Back."""

    def run(self, x: Float[Tensor, "B N C"], launch: Launch) -> Float[Tensor, "B N C"]:
        h = self.fc1.run(x, launch, self.norm, activation=self.activation)
        return self.fc2.run(h, launch, self.inner, residual=x)

    def about(self) -> About:
        fused = self.fc1.fusable and self.fc2.fusable and self.activation in ("gelu", "none")
        ops = "norm_linear + norm_linear" if fused else "norm + linear + activation + linear"
        return About(ops, f"{self.tokens}×{self.fc2.weight.shape[1]}", _all(self.fc1.primitive, self.fc2.primitive), fused)


@dataclass(frozen=True)
class RoutedMlpStep:
    """x + gate · Mlp_e(norm(x)): one router for a whole MLP."""

    name: str
    """Module name in the model."""
    tokens: int
    """Of one image."""
    norm: Norm
    """Before the router and the experts."""
    router: Float[Tensor, "E C"]
    """float32."""
    rows: Float[Tensor, "16 C"] | None
    """The router as the kernels read it, for two experts."""
    gate: bool
    """Whether the output is multiplied by the expert's probability."""
    activation: Activation
    """Between the linears of every expert."""
    first: tuple[Projection, ...]
    """fc1 of every expert; all of them stacked in one where the fused ops compute it."""
    second: tuple[Projection, ...]
    """fc2 likewise."""

    @property
    def fused(self) -> bool:
        return len(self.first) == 1

    def run(self, x: Float[Tensor, "B N C"], launch: Launch) -> Float[Tensor, "B N C"]:
        if self.fused:
            return self._run_fused(x, launch)
        a = self.norm.run(x.float())
        index, factor = routed(a, self.router, self.gate)
        y = torch.zeros_like(a)
        for number, (fc1, fc2) in enumerate(zip(self.first, self.second, strict=True)):
            part = fc2.expert(0, activate(fc1.expert(0, a), self.activation))
            y = torch.where((index == number).unsqueeze(-1), part, y)
        return (x + (y if factor is None else y * factor.unsqueeze(-1))).to(x.dtype)

    def _run_fused(self, x: Tensor, launch: Launch) -> Tensor:
        fc1, fc2 = self.first[0], self.second[0]
        h, choice = norm_linear(
            x, fc1.weight, fc1.bias, self.norm.pair, self.norm.eps, self.rows, activation="gelu", pdl=launch.pdl, backend=launch.backend
        )
        return x + moe_linear(h, choice, fc2.weight, fc2.bias, backend=launch.backend)

    def about(self) -> About:
        ops = "norm_linear + moe_linear + add" if self.fused else "norm + route + every expert"
        primitives = "|".join(p for projection in self.first for p in projection.primitives)
        return About(ops, f"{self.tokens}×{self.second[0].weight.shape[1]}", primitives, self.fused)


def lower_mlp(
    module: nn.Module, norm: nn.Module, name: str, norm_name: str, grid: tuple[int, int], tokens: int, prep: Preparation, scale: Tensor | None = None
) -> ConvMlpStep | MlpStep | RoutedMlpStep:
    """The step of an MLP behind its norm; `scale` is LayerScale's. UserError for an MLP of another form."""
    before = norm_of(norm, norm_name, prep)
    if before is None:
        raise UserError(f"the engine cannot lower {name}: no LayerNorm stands before it; run the model itself")
    if type(module) is MlpWithDepthwiseConv:
        conv, prep = module.dwconv, prep.inside(module, scale)
        weight, bias, primitive = convolution(conv, f"{name}.dwconv", "an ordinary or a shift convolution")
        return ConvMlpStep(
            name, before, lower_projection(module.fc1, f"{name}.fc1", prep), isinstance(module.relu, nn.ReLU), grid,
            prep.matrix(weight.flatten(1).t(), f"{name}.dwconv"), prep.vector(bias), activation_of(module.act, f"{name}.act"),
            lower_projection(module.fc2, f"{name}.fc2", prep, scale), primitive,
        )  # fmt: skip
    if type(module) is Mlp:
        return MlpStep(
            name, tokens, before, lower_projection(module.fc1, f"{name}.fc1", prep), activation_of(module.act, f"{name}.act"),
            norm_of(module.norm, f"{name}.norm", prep), lower_projection(module.fc2, f"{name}.fc2", prep, scale),
        )  # fmt: skip
    if isinstance(module, MoEMlp):
        if not module.enabled:
            return lower_mlp(module.experts[0], norm, f"{name}.experts.0", norm_name, grid, tokens, prep, scale)
        return _lower_mixture(module, before, name, grid, tokens, norm, norm_name, prep, scale)
    raise UserError(
        f"the engine cannot lower {name} ({type(module).__name__}): it takes timm's Mlp and PVTv2's MLP, and mixtures of them; "
        "run the model itself"
    )


def _lower_mixture(module, before, name, grid, tokens, norm, norm_name, prep, scale) -> RoutedMlpStep:
    steps = [lower_mlp(e, norm, f"{name}.experts.{i}", norm_name, grid, tokens, prep, scale) for i, e in enumerate(module.experts)]
    for step in steps:
        if not isinstance(step, MlpStep) or step.inner is not None or step.activation != steps[0].activation:
            raise UserError(f"the engine cannot lower {step.name}: an expert must be timm's Mlp without an inner norm; run the model itself")
        if step.fc1.router is not None or step.fc2.router is not None:
            raise UserError(f"the engine cannot lower {step.name}: an expert must not be a mixture itself; run the model itself")
    gate, router = module.router.gate == "paper", prep.vector(module.router.weight)
    first, second = tuple(step.fc1 for step in steps), tuple(step.fc2 for step in steps)
    if len(steps) == 2 and not gate and steps[0].activation == "gelu" and all(p.fusable for p in (*first, *second)):
        first, second = (_stack(first),), (_stack(second),)
    rows = route_rows(router, prep.dtype) if len(steps) == 2 else None
    return RoutedMlpStep(name, tokens, before, router, rows, gate, steps[0].activation, first, second)


def _stack(parts: tuple[Projection, ...]) -> Projection:
    bias = torch.cat([p.bias for p in parts]) if parts[0].bias is not None else None
    primitives = tuple(p.primitives[0] for p in parts)
    return Projection(torch.cat([p.weight for p in parts]), bias, None, False, (False,) * len(parts), primitives)


def _all(*primitives: str) -> str:
    """Each once, in order."""
    return ", ".join(dict.fromkeys(primitives))
