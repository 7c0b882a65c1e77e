"""Which dense model a result belongs to, so that results of another one are refused by name."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from shiftaddvit.errors import UserError

from .sites import find_sites


@dataclass(frozen=True)
class Identity:
    """A dense model, as far as results about its layers depend on it."""

    sites: tuple[str, ...]
    """Every attention and MLP with the shapes of its linears, in the order of the model."""
    weights: str
    """Fingerprint of every parameter and buffer."""

    def check_layers(self, other: "Identity", source: str) -> None:
        """Raise UserError naming the first layer in which the model of `source` (`other`) differs from this one."""
        for mine, theirs in zip(self.sites, other.sites, strict=False):
            if mine != theirs:
                raise UserError(f"{source} is of another model: it has {theirs} where this one has {mine}")
        if len(self.sites) != len(other.sites):
            raise UserError(f"{source} is of another model: it has {len(other.sites)} attentions and MLPs, this one {len(self.sites)}")

    def check(self, other: "Identity", source: str) -> None:
        """The same, and the weights must be equal too."""
        self.check_layers(other, source)
        if self.weights != other.weights:
            raise UserError(f"{source} was measured with other weights (fingerprint {other.weights}, this model's is {self.weights})")

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self) | {"sites": list(self.sites)}

    @classmethod
    def from_json(cls, values: Any, source: str) -> "Identity":
        """The inverse of `to_json`. UserError naming `source` for anything else."""
        known = isinstance(values, Mapping) and isinstance(values.get("weights"), str) and isinstance(values.get("sites"), list)
        if not known or not all(isinstance(site, str) for site in values["sites"]):
            raise UserError(f"{source} does not say which model it is of (entry 'identity'): it is damaged or of an older version")
        return cls(tuple(values["sites"]), values["weights"])


def identity(model: nn.Module) -> Identity:
    """Of a dense model. UserError for one without attention and MLPs, or a converted one."""
    if hasattr(model, "shiftaddvit_recipe"):
        raise UserError(f"the model is already converted (recipe {model.shiftaddvit_recipe.name!r}); start from the dense model")
    attentions, mlps = find_sites(model)
    sites = []
    for site in (*attentions, *mlps):
        linears = (site.module.get_submodule(name) for name in site.linears)
        shapes = ", ".join(f"{name} {x.in_features}→{x.out_features}" for name, x in zip(site.linears, linears, strict=True))
        sites.append(f"{site.name} ({shapes})")
    return Identity(tuple(sites), _fingerprint(model))


def _fingerprint(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()[:16]
