"""How many bits the tensors of an integer network have."""

from dataclasses import dataclass

from shiftaddvit.errors import UserError


@dataclass(frozen=True)
class Widths:
    """Bits of signed integers, by the part a tensor plays."""

    activation: int = 8
    """Inputs of linear layers, values of attention, and what softmax attention reads."""
    stream: int = 16
    """The residual stream, what is added to it, queries and keys before they become codes, pooled features and logits."""
    table: int = 10
    """Inputs of GELU's table, which has 2^bits entries."""
    image: int = 12
    """Normalised pixels."""

    def __post_init__(self) -> None:
        for name, low, high in (("activation", 4, 16), ("stream", 8, 16), ("table", 4, 12), ("image", 8, 16)):
            if not low <= getattr(self, name) <= high:
                raise UserError(f"Widths.{name} must be from {low} to {high}, got {getattr(self, name)}")
