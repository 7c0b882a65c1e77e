"""Mixtures of a multiplication expert and a shift expert (ShiftAddViT section 4.3)."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from shiftaddvit.ops.moe_train import moe_train

from .lean import as_computed, attach_gate
from .router import Gate, Router, Routing
from .shift import ShiftConfig, ShiftLinear

Expert = Literal["mult", "shift"]


@dataclass(frozen=True)
class MoEConfig:
    """What a mixture is made of."""

    experts: tuple[Expert, ...] = ("mult", "shift")
    """The experts; each starts from the same pre-trained weight."""
    gate: Gate = "value-preserving"
    """`value-preserving`: p/stopgrad(p), which keeps the pre-trained function and needs no multiplication at inference; `paper`: p."""
    noise: bool = True
    """Gaussian noise of standard deviation 1/experts on the logits, in training only."""
    router: Literal["linear", "mlp"] = "linear"
    """One router for each linear (PVTv2) or one for each MLP (PVTv1); an MLP with a depthwise convolution inside needs `linear`."""

    def __post_init__(self) -> None:
        if len(self.experts) < 2 or not set(self.experts) <= {"mult", "shift"}:
            raise ValueError(f"MoEConfig.experts must be two or more of 'mult' and 'shift', got {self.experts}")
        if self.gate not in ("value-preserving", "paper"):
            raise ValueError(f"MoEConfig.gate must be 'value-preserving' or 'paper', got {self.gate!r}")
        if self.router not in ("linear", "mlp"):
            raise ValueError(f"MoEConfig.router must be 'linear' or 'mlp', got {self.router!r}")


class _Mixture(nn.Module):
    """A router over experts of the same signature. Every expert is computed on every token and the routed row kept, so there is no host
    sync and no data-dependent shape; `MoELinear` trains on a GPU by kernels that compute what is kept (`ops/moe_train`).

    Under autocast router and experts see the rows in the dtype that the experts compute in, as a deployed engine does. With `enabled = False` every token goes to the first expert.
    """

    def __init__(self, dim: int, experts: list[nn.Module], config: MoEConfig):
        super().__init__()
        self.config = config
        self.enabled = True
        self.router = Router(dim, len(experts), config.gate, config.noise)
        self.experts = nn.ModuleList(experts)
        # Relative cost of one token on each expert; the balance loss reads it. Equal until measured on the target device.
        self.register_buffer("latency", torch.full((len(experts),), 1.0 / len(experts)))

    def forward(self, x: Float[Tensor, "*tokens in"]) -> Float[Tensor, "*tokens out"]:
        if not self.enabled:
            return self.experts[0](x)
        x = as_computed(x)
        routing = self.router(x)
        output = self.experts[0](x)
        for number, expert in enumerate(self.experts[1:], start=1):
            output = torch.where((routing.index == number).unsqueeze(-1), expert(x), output)
        if self.config.gate == "paper":
            return output * routing.gate.unsqueeze(-1).to(output.dtype)
        return attach_gate(output, routing.gate) if torch.is_grad_enabled() else output  # the gate is exactly one


class MoELinear(_Mixture):
    """y = gate · Expert_{e*}(x) with linear experts; `experts[i]` is `nn.Linear` or `ShiftLinear`, as `config.experts` says."""

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, config: MoEConfig = MoEConfig(), shift: ShiftConfig = ShiftConfig()
    ) -> "MoELinear":
        """Every expert starts from the weight of `linear`."""
        make: dict[str, Callable[[], nn.Module]] = {
            "mult": lambda: deepcopy(linear),
            "shift": lambda: ShiftLinear.from_linear(linear, shift),
        }
        layer = cls(linear.in_features, [make[kind]() for kind in config.experts], config)
        return layer.to(linear.weight.device).train(linear.training)

    def forward(self, x: Float[Tensor, "*tokens in"]) -> Float[Tensor, "*tokens out"]:
        rows = as_computed(x)
        if not self.trains_by_kernel(rows):
            return super().forward(rows)
        noise = self.router.draw(rows)
        weight = torch.stack([expert.weight.to(rows.dtype) for expert in self.experts])
        biases = [expert.bias for expert in self.experts]
        bias = None if biases[0] is None else torch.stack(biases).float()
        y, clean, index = moe_train(rows, self.router.weight.float(), noise, weight, bias)
        self.router(rows, decided=Routing.by_kernel(index, clean, noise))
        return y

    def trains_by_kernel(self, x: Tensor) -> bool:
        """Whether one op computes router and routed rows: two plain experts in half precision on a GPU, with gradients and a gate of one."""
        plain = all(type(expert) is nn.Linear or (type(expert) is ShiftLinear and not expert.config.fixed_point) for expert in self.experts)
        wanted = self.enabled and self.config.gate == "value-preserving" and torch.is_grad_enabled()
        return wanted and x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and plain and len(self.experts) == 2

    @property
    def in_features(self) -> int:
        return self.experts[0].in_features

    @property
    def out_features(self) -> int:
        return self.experts[0].out_features


class MoEMlp(_Mixture):
    """One router for a whole MLP, as the published PVTv1 has it: `experts[0]` is the MLP, `experts[1]` its shift form."""

    @classmethod
    def from_mlp(cls, mlp: nn.Module, to_shift: Callable[[nn.Module], nn.Module], config: MoEConfig) -> "MoEMlp":
        """`to_shift` turns a copy of `mlp` into its shift form."""
        experts = [to_shift(deepcopy(mlp)) if kind == "shift" else deepcopy(mlp) for kind in config.experts]
        weight = mlp.fc1.weight
        return cls(mlp.fc1.in_features, experts, config).to(weight.device).train(mlp.training)
