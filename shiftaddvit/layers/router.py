"""The per-token router of a mixture of experts, and the record of what it decided (ShiftAddViT section 4.3)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from .lean import wide_linear

Gate = Literal["value-preserving", "paper"]


class Routing(NamedTuple):
    """What a router decided for every token; leading dimensions are those of its input without channels."""

    index: Int[Tensor, "*tokens"]
    """The expert each token goes to: the argmax of the noisy logits."""
    gate: Float[Tensor, "*tokens"]
    """The factor on the expert's output: p/stopgrad(p) = 1, or p."""
    logits: Float[Tensor, "*tokens experts"]
    """With noise in training, the same as `clean_logits` otherwise."""
    clean_logits: Float[Tensor, "*tokens experts"]
    """W_r x."""

    @classmethod
    def by_kernel(cls, index: Int[Tensor, "*tokens"], clean: Float[Tensor, "*tokens experts"], noise: Float[Tensor, "*tokens experts"] | None) -> "Routing":
        """What a kernel has decided, whose gates are one and already have their gradient."""
        return cls(index, clean.new_ones(()).expand(index.shape), clean if noise is None else clean + noise, clean)

    @property
    def probs(self) -> Float[Tensor, "*tokens experts"]:
        """softmax of the noisy logits, computed where it is asked for."""
        return self.logits.softmax(dim=-1)


class Router(nn.Module):
    """p = softmax(W_r x + noise), expert e* = argmax p. Computed in float32 whatever the autocast dtype, so that a token's expert does
    not depend on the precision around it. Noise ~ N(0, 1/experts) only in training."""

    primitive = "mult"

    def __init__(self, dim: int, experts: int = 2, gate: Gate = "value-preserving", noise: bool = True):
        super().__init__()
        if gate not in ("value-preserving", "paper"):
            raise ValueError(f"gate must be 'value-preserving' or 'paper', got {gate!r}")
        self.dim, self.experts, self.gate, self.noise = dim, experts, gate, noise
        self.weight = nn.Parameter(torch.empty(experts, dim))
        nn.init.normal_(self.weight, std=dim**-0.5)

    @property
    def noise_std(self) -> float:
        return 1.0 / self.experts

    def draw(self, x: Float[Tensor, "*tokens dim"]) -> Float[Tensor, "*tokens experts"] | None:
        """Noise for every token's logits, in training."""
        if not (self.training and self.noise):
            return None
        return torch.randn(*x.shape[:-1], self.experts, device=x.device) * self.noise_std

    def forward(self, x: Float[Tensor, "*tokens dim"], decided: Routing | None = None) -> Routing:
        """Decide, or pass on what a kernel has `decided`, so that whoever records routers sees that too."""
        if decided is not None:
            return decided
        with torch.autocast(x.device.type, enabled=False):
            if torch.is_grad_enabled() and x.dtype in (torch.bfloat16, torch.float16):
                clean = wide_linear(x, self.weight)
            else:
                clean = F.linear(x.float(), self.weight.float())
            noise = self.draw(x)
            noisy = clean if noise is None else clean + noise
            index = noisy.argmax(dim=-1)
            chosen = noisy.softmax(dim=-1).gather(-1, index.unsqueeze(-1)).squeeze(-1)
            gate = chosen / chosen.detach() if self.gate == "value-preserving" else chosen
        return Routing(index, gate, noisy, clean)

    def extra_repr(self) -> str:
        return f"{self.dim}, experts={self.experts}, gate={self.gate}"


@contextmanager
def record_routing(model: nn.Module) -> Iterator[dict[str, Routing]]:
    """Yield a dict that every forward fills with `{name of the module that owns the router: Routing}`.

    Enter it before `torch.compile` sees the model. The dict keeps the last forward's records only.
    """
    records: dict[str, Routing] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, Router):
            owner = name.rpartition(".")[0]
            handles.append(module.register_forward_hook(_recorder(records, owner)))
    try:
        yield records
    finally:
        for handle in handles:
            handle.remove()


def _recorder(records: dict[str, Routing], owner: str):
    def record(_module: nn.Module, _inputs: tuple, output: Routing) -> None:
        records[owner] = output

    return record
