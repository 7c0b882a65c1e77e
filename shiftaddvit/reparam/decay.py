"""Which parameters of a converted model weight decay must leave alone, said so that timm's optimisers hear it too."""

from dataclasses import dataclass

from torch import nn

from shiftaddvit.layers.adder import AdderConv2d, AdderLinear
from shiftaddvit.layers.attention import TokenConv
from shiftaddvit.layers.router import Router
from shiftaddvit.layers.shift import ShiftLayer


@dataclass(frozen=True)
class NoWeightDecay:
    """What `model.no_weight_decay` becomes: called, it gives the names, as timm's optimisers expect. A class, so that models pickle."""

    names: frozenset[str]
    """Full names of parameters."""

    def __call__(self) -> set[str]:
        return set(self.names)


def undecayed(model: nn.Module) -> set[str]:
    """Names of exponents, signs, quantised latents, routers, token convolutions and adders: decay would pull |W| = 2^s to 1, signs
    to 0, and the channels of an adder to one and the same −Σ|x|."""
    names = set()
    for name, module in model.named_modules():
        if isinstance(module, ShiftLayer):
            ours = {id(parameter) for parameter in module.latent_parameters()}
        elif isinstance(module, (Router, TokenConv, AdderLinear, AdderConv2d)):
            ours = {id(parameter) for parameter in module.parameters()}
        else:
            continue
        names |= {f"{name}.{key}".removeprefix(".") for key, parameter in module.named_parameters() if id(parameter) in ours}
    return names


def tell_timm(model: nn.Module) -> None:
    """Add them to what the model itself exempts."""
    own = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    model.no_weight_decay = NoWeightDecay(frozenset(own) | undecayed(model))
