"""Weights prepared once: linears, shift layers and mixtures as one `Projection`, norms as one `Norm`."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from timm.layers import LayerNorm as TimmLayerNorm
from timm.layers import LayerNormFp32
from torch import Tensor, nn

from shiftaddvit.errors import UserError
from shiftaddvit.layers.adder import NormedAdder, ShiftAdder
from shiftaddvit.layers.moe import MoELinear
from shiftaddvit.layers.packed import PackedShiftConv2d, PackedShiftLinear
from shiftaddvit.layers.shift import ShiftConv2d, ShiftLinear
from shiftaddvit.numerics import fixed_point
from shiftaddvit.ops.matshift import formats
from shiftaddvit.ops.norm_linear import norm_linear, route_rows

from .program import Launch

LARGEST_INSIDE = 1e3
"""Weights up to this leave float16 room for their products."""

Activation = Literal["none", "gelu", "gelu-tanh", "relu", "silu", "quick-gelu"]

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "gelu": F.gelu,
    "gelu-tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "quick-gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


@dataclass(frozen=True)
class Preparation:
    """Where weights go, and what happened to them on the way."""

    dtype: torch.dtype
    """Of matrices and activations; vectors stay float32."""
    device: torch.device
    """Where the weights will live."""
    notes: list[str] = field(default_factory=list)
    """Filled while lowering."""
    uniform: bool = False
    """Nothing has another dtype inside: for kernels that take a whole block."""

    def inside(self, module: nn.Module, scale: Tensor | None = None) -> "Preparation":
        """For a module whose inner results never meet the residual: on a GPU float16 in place of bfloat16, with eight times its precision and
        sums of two channels an instruction, unless a weight in use, times LayerScale's `scale`, is beyond `LARGEST_INSIDE`."""
        if self.uniform or self.device.type != "cuda" or self.dtype != torch.bfloat16:
            return self
        weights = (weight for part in module.modules() if isinstance(weight := getattr(part, "weight", None), Tensor) and weight.numel())
        largest = max((float(weight.detach().abs().max()) for weight in weights), default=0.0)
        largest *= max(1.0, float(scale.detach().abs().max())) if scale is not None else 1.0
        return replace(self, dtype=torch.float16) if largest <= LARGEST_INSIDE else self

    def vector(self, tensor: Tensor | None) -> Tensor | None:
        """A float32 copy on the device."""
        return None if tensor is None else tensor.detach().to(self.device, torch.float32, copy=True).contiguous()

    def matrix(self, tensor: Tensor, name: str) -> Tensor:
        """A copy in the compute dtype. UserError where a value does not fit."""
        wide = tensor.detach().to(self.device, torch.float32)
        narrow = wide.to(self.dtype, copy=True).contiguous()
        if self.dtype == torch.float16:
            if bool((narrow.isinf() & wide.isfinite()).any()):
                raise UserError(f"{name} has weights up to {float(wide.abs().max()):.3g}, beyond float16: deploy with dtype=torch.bfloat16")
            lost = int(((narrow == 0) & (wide != 0)).sum())
            if lost:
                self.notes.append(f"{name}: {lost} weights below 2^-25 became zero in float16")
        return narrow


@dataclass(frozen=True)
class Norm:
    """LayerNorm over channels."""

    weight: Float[Tensor, "C"]
    """Scale, float32."""
    bias: Float[Tensor, "C"]
    """Shift, float32."""
    eps: float
    """Added to the variance."""

    @property
    def pair(self) -> tuple[Tensor, Tensor]:
        return self.weight, self.bias

    def run(self, x: Float[Tensor, "*batch C"]) -> Float[Tensor, "*batch C"]:
        """Computed in float32; the result has the dtype of x."""
        return F.layer_norm(x.float(), self.weight.shape, self.weight, self.bias, self.eps).to(x.dtype)


@dataclass(frozen=True)
class Projection:
    """A linear layer, or a mixture of them, each row through one."""

    weight: Float[Tensor, "E out in"]
    """Experts, stacked."""
    bias: Float[Tensor, "E out"] | None
    """float32."""
    router: Float[Tensor, "E in"] | None
    """float32; None for one expert."""
    gate: bool
    """Whether the expert's output is multiplied by its probability (the paper's gate)."""
    fixed_point: tuple[bool, ...]
    """Which experts round their input to 16.16 fixed point."""
    primitives: tuple[str, ...]
    """One an expert."""
    rows: Float[Tensor, "16 in"] | None = None
    """The router as the kernels read it, for two experts."""

    @property
    def fusable(self) -> bool:
        """Whether the fused ops compute it."""
        return self.weight.shape[0] <= 2 and not self.gate and not any(self.fixed_point)

    @property
    def primitive(self) -> str:
        return "|".join(self.primitives)

    @property
    def biased(self) -> dict[str, Tensor | None]:
        """The arguments that every fused op names alike."""
        return {"weight": self.weight, "bias": self.bias, "router": self.rows}

    def run(
        self,
        x: Float[Tensor, "*batch in"],
        launch: Launch,
        norm: Norm | None = None,
        residual: Float[Tensor, "*batch out"] | None = None,
        activation: Activation = "none",
    ) -> Float[Tensor, "*batch out"]:
        """residual + activation(Expert(norm(x))), in the dtype of the residual, or without one in that of the weights."""
        if not self.fusable:
            return self._unfused(x, norm, residual, activation)
        inside = activation in ("none", "gelu")
        y, _ = norm_linear(
            x,
            **self.biased,
            norm=norm.pair if norm else None,
            eps=norm.eps if norm else 0.0,
            residual=residual if inside else None,
            activation=activation if inside else "none",
            pdl=launch.pdl,
            backend=launch.backend,
        )
        if inside:
            return y
        y = activate(y, activation)
        return y if residual is None else y + residual

    def _unfused(self, x: Tensor, norm: Norm | None, residual: Tensor | None, activation: Activation) -> Tensor:
        a = x.float()
        a = norm.run(a) if norm else a
        index, factor = self.route(a)
        y = self.expert(0, a)
        for number in range(1, self.weight.shape[0]):
            y = torch.where((index == number).unsqueeze(-1), self.expert(number, a), y)
        y = activate(y if factor is None else y * factor.unsqueeze(-1), activation)
        return y.to(self.weight.dtype) if residual is None else (y + residual).to(residual.dtype)

    def expert(self, number: int, a: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """One expert on every row, in float32."""
        a = fixed_point(a) if self.fixed_point[number] else a
        return F.linear(a, self.weight[number].float(), self.bias[number] if self.bias is not None else None)

    def route(self, a: Float[Tensor, "*batch in"]) -> tuple[Int[Tensor, "*batch"] | None, Float[Tensor, "*batch"] | None]:
        """Each row's expert, and the factor on its output."""
        return (None, None) if self.router is None else routed(a, self.router, self.gate)


def routed(a: Tensor, router: Tensor, gate: bool) -> tuple[Tensor, Tensor | None]:
    """argmax of the router's logits, and its probability where the gate is the paper's."""
    logits = F.linear(a, router)
    index = logits.argmax(dim=-1)
    return index, logits.softmax(dim=-1).gather(-1, index.unsqueeze(-1)).squeeze(-1) if gate else None


def activate(x: Tensor, activation: Activation) -> Tensor:
    return _ACTIVATIONS[activation](x)


def projection(module: nn.Module, name: str, prep: Preparation, scale: Tensor | None = None) -> Projection:
    """Prepare a linear-like layer; `scale` (out,) multiplies its output (LayerScale). UserError for a layer of another kind."""
    if isinstance(module, MoELinear) and module.enabled:
        parts = [matrix(expert, f"{name}.experts.{i}") for i, expert in enumerate(module.experts)]
        router, gate = prep.vector(module.router.weight), module.router.gate == "paper"
    else:
        parts, router, gate = [matrix(module.experts[0] if isinstance(module, MoELinear) else module, name)], None, False
    weights, biases, rounds, primitives = zip(*parts, strict=True)
    weight, bias = torch.stack(weights), torch.stack(biases) if biases[0] is not None else None
    if scale is not None:
        weight, bias = weight * scale.to(weight).unsqueeze(-1), bias * scale.to(bias) if bias is not None else None
    rows = route_rows(router, prep.dtype) if router is not None and len(parts) == 2 else None
    return Projection(prep.matrix(weight, name), prep.vector(bias), router, gate, rounds, primitives, rows)


def joined(parts: list[Projection]) -> Projection | None:
    """One projection whose outputs are those of all parts, where they are single experts of the same kind; else None."""
    if any(not p.fusable or p.router is not None for p in parts) or len({p.bias is None for p in parts}) > 1:
        return None
    bias = torch.cat([p.bias for p in parts], dim=1) if parts[0].bias is not None else None
    primitives = tuple(dict.fromkeys(p.primitive for p in parts))
    return Projection(torch.cat([p.weight for p in parts], dim=1), bias, None, False, (False,), ("+".join(primitives),))


def matrix(module: nn.Module, name: str) -> tuple[Tensor, Tensor | None, bool, str]:
    """Weight and bias in float32, whether inputs are rounded to fixed point, and the primitive. UserError for a layer that is no matrix."""
    if isinstance(module, ShiftAdder) and not module.enabled:
        return matrix(module.shift, f"{name}.shift")
    if isinstance(module, NormedAdder) and not module.enabled and not module.picture:
        return module.adder.weight.detach().float(), module.norm.bias.detach().float(), False, "mult"
    bias = module.bias.detach().float() if getattr(module, "bias", None) is not None else None
    if isinstance(module, PackedShiftLinear):
        weight, rounds = formats.decode(module.integer_codes(), module.bits, module.offset, torch.float32), module.config.fixed_point
    elif isinstance(module, ShiftLinear):
        weight, rounds = module.weight.detach().float(), module.config.fixed_point and module.enabled
    elif type(module).__name__ in ("Linear", "NonDynamicallyQuantizableLinear") and isinstance(module, nn.Linear):
        return module.weight.detach().float(), bias, False, "mult"
    else:
        raise UserError(
            f"the engine cannot lower {name} ({type(module).__name__}): it takes Linear, ShiftLinear, PackedShiftLinear and MoELinear; "
            "run the model itself, or convert this layer with another recipe"
        )
    return weight, fixed_point(bias) if rounds and bias is not None else bias, rounds, "shift"


def convolution(module: nn.Module, name: str, form: str) -> tuple[Tensor, Tensor | None, str]:
    """Weight and bias of a convolution in float32, and its primitive. UserError for one that is not `form` (in words), or rounds its inputs."""
    if type(module) is nn.Conv2d:
        primitive = "mult"
    elif isinstance(module, (ShiftConv2d, PackedShiftConv2d)):
        primitive = "shift"
        if module.config.fixed_point:
            raise UserError(f"the engine cannot lower {name}: its inputs are rounded to fixed point; set shift.fixed_point = false or run the model")
    else:
        raise UserError(f"the engine cannot lower {name} ({type(module).__name__}): it takes {form}; run the model itself")
    return module.weight.detach().float(), module.bias.detach().float() if module.bias is not None else None, primitive


def norm_of(module: nn.Module | None, name: str, prep: Preparation) -> Norm | None:
    """A norm's parameters; None for no norm. UserError for anything but LayerNorm over channels."""
    if module is None or isinstance(module, nn.Identity):
        return None
    if type(module) not in (nn.LayerNorm, TimmLayerNorm, LayerNormFp32) or len(module.normalized_shape) != 1:
        raise UserError(f"the engine cannot lower {name} ({type(module).__name__}): it takes LayerNorm over channels; run the model itself")
    width = module.normalized_shape[0]
    weight = module.weight if module.weight is not None else torch.ones(width)
    bias = module.bias if module.bias is not None else torch.zeros(width)
    return Norm(prep.vector(weight), prep.vector(bias), module.eps)


def activation_of(module: nn.Module, name: str) -> Activation:
    """The name of an activation module. UserError for one the engine does not have."""
    kind = type(module).__name__
    if kind == "GELU":
        return "gelu-tanh" if getattr(module, "approximate", "none") == "tanh" else "gelu"
    known: dict[str, Activation] = {
        "GELUTanh": "gelu-tanh", "ReLU": "relu", "SiLU": "silu", "Swish": "silu", "QuickGELU": "quick-gelu", "Identity": "none",
    }  # fmt: skip
    if kind not in known:
        raise UserError(f"the engine cannot lower {name} (activation {kind}): it takes GELU, ReLU, SiLU and QuickGELU; run the model itself")
    return known[kind]
