"""How many multiplications one forward does, and which tokens a mixture's experts get."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from shiftaddvit.cost.operations import Nest
from shiftaddvit.cost.trace import trace
from shiftaddvit.layers.moe import MoELinear, MoEMlp
from shiftaddvit.layers.router import record_routing

Shares = Mapping[str, tuple[float, ...]]
"""By the mixture's module name: the share of tokens of each of its experts."""


def multiplications(model: nn.Module, image_size: int, shares: Shares) -> float:
    """Multiplications of one image in linear layers, convolutions and matrix products; an expert's count by its share of the tokens.
    Norms, activations and softmax are not counted."""
    total = 0.0
    for operation in trace(model, (1, 3, image_size, image_size)).operations:
        if isinstance(operation, Nest) and operation.primitive == "mult":
            steps = float(operation.macs)
            for expert in operation.experts:
                steps *= shares[expert.mixture][expert.index]
            total += steps
    return total


@torch.no_grad()
def token_shares(model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]], device: torch.device | str) -> tuple[Shares, float | None]:
    """The share of each expert in each mixture over all images of `loader`, and the share of tokens that go to shift experts over all
    mixtures together (None for a model without mixtures). Expects a model in evaluation mode."""
    mixtures = {name: module for name, module in model.named_modules() if isinstance(module, (MoELinear, MoEMlp))}
    if not mixtures:
        return {}, None
    counts = {name: torch.zeros(len(module.experts), dtype=torch.float64) for name, module in mixtures.items()}
    with record_routing(model) as routing:
        for images, _ in loader:
            model(images.to(device))
            for name, found in routing.items():
                counts[name] += torch.bincount(found.index.flatten().cpu(), minlength=len(counts[name]))
    shifted = sum(count[index] for name, count in counts.items() for index, kind in enumerate(mixtures[name].config.experts) if kind == "shift")
    shares = {name: tuple((count / count.sum()).tolist()) for name, count in counts.items()}
    return shares, float(shifted / sum(count.sum() for count in counts.values()))
