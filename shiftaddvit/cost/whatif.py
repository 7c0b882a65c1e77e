"""Several recipes side by side, and one recipe over a range of settings."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from shiftaddvit.errors import UserError, unknown

from .estimate import named_energy
from .result import Energy
from .settings import Settings

Over = Literal["shift-share", "weight-bits", "shift-bits", "activation-bits"]
RANGES: dict[str, tuple[float, ...]] = {
    "shift-share": tuple(i / 10 for i in range(11)),
    "weight-bits": (4, 6, 8, 12, 16, 24, 32),
    "shift-bits": (2, 3, 4, 5, 6, 8),
    "activation-bits": (4, 6, 8, 12, 16, 24, 32),
}
REFERENCES = ("msa", "pvt", "ecoformer")
"""Baselines that a comparison always shows; Ecoformer's hashing can make it dearer than PVT's spatial reduction."""


@dataclass(frozen=True)
class Comparison:
    """Recipes of one model under the same settings."""

    baseline: str
    """The recipe that savings refer to."""
    energies: dict[str, Energy]
    """By recipe."""

    def saving(self, recipe: str, baseline: str | None = None) -> float:
        """Share of the baseline's energy that a recipe saves; negative if it costs more."""
        return 1 - self.energies[recipe].total_mj / self.energies[baseline or self.baseline].total_mj

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        against = [name for name in dict.fromkeys([self.baseline, *REFERENCES]) if name in self.energies]
        return {
            "baseline": self.baseline,
            "recipes": {
                name: {"total_mj": found.total_mj, "saving": {other: self.saving(name, other) for other in against}} | found.to_dict()
                for name, found in self.energies.items()
            },
        }


@dataclass(frozen=True)
class Sweep:
    """One recipe over a range of one setting."""

    over: str
    """The setting."""
    values: tuple[float, ...]
    """Its values."""
    energies: tuple[Energy, ...]
    """One for each value."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        first = self.energies[0]
        return {
            "model": first.model, "over": self.over, "values": list(self.values),
            "total_mj": [found.total_mj for found in self.energies],
            "by_level_mj": [found.by_level() for found in self.energies], "settings": dict(first.settings),
        }  # fmt: skip


def compare(
    model: str,
    recipes: Sequence[str],
    baseline: str = "msa",
    settings: Settings = Settings(),
    shift_share: float | None = None,
    image_size: int | tuple[int, int] | None = None,
    batch: int = 1,
) -> Comparison:
    """Energy of `model` under each recipe, and under the baselines that belong beside them. A view synthesis network is compared with
    itself as it is (`dense`)."""
    always = ("dense",) if model in ("nerf", "gnt") else REFERENCES
    if model in ("nerf", "gnt") and baseline in REFERENCES:
        baseline = "dense"
    names = dict.fromkeys([*always, baseline, *recipes])
    return Comparison(baseline, {name: named_energy(model, name, settings, shift_share, image_size, batch) for name in names})


def sweep(
    model: str,
    recipe: str,
    over: Over,
    values: Sequence[float] | None = None,
    settings: Settings = Settings(),
    shift_share: float | None = None,
    image_size: int | tuple[int, int] | None = None,
    batch: int = 1,
) -> Sweep:
    """Energy of `model` under `recipe` as one setting varies. Widths vary in mode `eyeriss` only."""
    if over not in RANGES:
        raise unknown("sweep", over, RANGES)
    if over != "shift-share" and settings.mode == "paper":
        raise UserError(f"mode 'paper' has fixed widths: a sweep over {over} needs mode 'eyeriss'")
    values = tuple(RANGES[over] if values is None else values)
    if not values:
        raise UserError(f"a sweep over {over} needs at least one value")
    if over != "shift-share" and (odd := [value for value in values if not float(value).is_integer()]):
        raise UserError(f"{over} must be whole numbers, got {odd[0]:g}")
    found = []
    for value in values:
        if over == "shift-share":
            found.append(named_energy(model, recipe, settings, value, image_size, batch))
            if not found[0].tokens:
                raise UserError(f"{found[0].model} has no mixtures of experts: a sweep over {over} has nothing to vary")
            continue
        field = {"weight-bits": "weight", "shift-bits": "shift_weight", "activation-bits": "activation"}[over]
        bits = replace(settings.bits, **{field: int(value)})
        found.append(named_energy(model, recipe, replace(settings, bits=bits), shift_share, image_size, batch))
    return Sweep(over, values, tuple(found))
