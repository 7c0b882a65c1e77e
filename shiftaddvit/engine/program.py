"""A model as a list of steps with prepared weights: run in order, listed, compared and refilled."""

from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

from shiftaddvit.errors import UserError
from shiftaddvit.ops.backends import Backend


@dataclass(frozen=True)
class Launch:
    """How the ops of a program are launched."""

    backend: Backend = "auto"
    """The implementation of every op."""
    pdl: bool = False
    """Overlap each kernel's launch with the kernel before it (programmatic dependent launch)."""


@dataclass(frozen=True)
class About:
    """What `describe` says of a step."""

    ops: str
    """The ops it runs, in order."""
    shape: str
    """Tokens × channels of its result, for one image."""
    primitives: str
    """What its products are: mult, shift, add; `mult|shift` for a mixture."""
    fused: bool
    """Whether it runs on the package's fused ops alone."""


class Step(Protocol):
    """A frozen dataclass: a name, weights, and a pure function of tokens."""

    name: str

    def run(self, x: Tensor, launch: Launch) -> Tensor: ...

    def about(self) -> About: ...


@dataclass(frozen=True)
class Program:
    """A lowered model."""

    steps: tuple[Step, ...]
    """From the picture to the logits."""
    dtype: torch.dtype
    """Of weights and activations."""
    channels: int
    """Of the picture."""
    image_size: tuple[int, int]
    """Height and width of the picture."""
    outputs: int
    """Logits of one image."""
    mixes_images: bool = False
    """Whether an image's logits depend on its batch-mates (the published threshold over a whole batch)."""
    notes: tuple[str, ...] = ()
    """What preparing the weights had to give up."""

    @torch.no_grad()
    def run(self, images: Float[Tensor, "B I H W"], launch: Launch = Launch()) -> Float[Tensor, "B K"]:
        """float32 logits."""
        x = images
        for step in self.steps:
            x = step.run(x, launch)
        return x

    def tensors(self) -> Iterator[Tensor]:
        """Every prepared weight."""
        return tensors_of(self.steps)

    @property
    def device(self) -> torch.device:
        return next(self.tensors()).device

    @property
    def weight_bytes(self) -> int:
        """Bytes of all prepared weights."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors())

    @torch.no_grad()
    def fill_from(self, other: "Program") -> None:
        """Copy the weights of `other` into this program's. UserError naming the first step that is not of the same form."""
        for mine, theirs in zip(self.steps, other.steps, strict=False):
            if _form(mine) != _form(theirs):
                raise UserError(f"cannot reload: the new model differs at {theirs.name}; deploy it anew")
        if len(self.steps) != len(other.steps) or self.image_size != other.image_size or self.mixes_images != other.mixes_images:
            raise UserError(f"cannot reload: the new model has {len(other.steps)} steps, this engine {len(self.steps)}; deploy it anew")
        for mine, theirs in zip(self.tensors(), other.tensors(), strict=True):
            mine.copy_(theirs)


def tensors_of(value: object) -> Iterator[Tensor]:
    """Every tensor inside a step, a tuple of steps or a module."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, nn.Module):
        yield from value.parameters()
        yield from value.buffers()
    elif isinstance(value, tuple):
        for item in value:
            yield from tensors_of(item)
    elif is_dataclass(value):
        for field in fields(value):
            yield from tensors_of(getattr(value, field.name))


def _form(value: object) -> object:
    """Everything about a step but the values of its tensors."""
    if isinstance(value, Tensor):
        return ("tensor", tuple(value.shape), value.dtype)
    if isinstance(value, nn.Module):
        plain = {name: item for name, item in vars(value).items() if not name.startswith("_")}
        return (type(value), repr(value), plain, *(tuple(tensor.shape) for tensor in tensors_of(value)))
    if isinstance(value, tuple):
        return tuple(_form(item) for item in value)
    if is_dataclass(value):
        return (type(value), *(_form(getattr(value, field.name)) for field in fields(value)))
    return value
