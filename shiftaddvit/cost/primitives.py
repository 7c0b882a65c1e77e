"""What one multiplication, addition and shift cost in 45 nm, each number with its source."""

import tomllib
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources


@dataclass(frozen=True)
class UnitCost:
    """One arithmetic step."""

    name: str
    """`mult`, `add` or `shift`."""
    format: str
    """`fp32`, `int8`, …"""
    energy_pj: float
    """Energy."""
    energy_source: str
    """Key of its source."""
    area_um2: float | None = None
    """Area of the unit; None where no source is known."""
    area_source: str | None = None
    """Key of its source."""


@lru_cache(maxsize=1)
def unit_costs() -> tuple[UnitCost, ...]:
    """Every known cell."""
    return tuple(UnitCost(**row) for row in _file()["primitive"])


def sources() -> dict[str, str]:
    """What the keys of sources stand for."""
    return dict(_file()["sources"])


def ratio(of: tuple[str, str], to: tuple[str, str]) -> tuple[float, float | None]:
    """How many times more energy and area one (name, format) takes than another; None without both areas.

    The published "up to 31× energy" is an int32 mult against an int32 *add*; against an int32 shift it is 24×.
    """
    table = {(cost.name, cost.format): cost for cost in unit_costs()}
    a, b = table[of], table[to]
    area = a.area_um2 / b.area_um2 if a.area_um2 is not None and b.area_um2 is not None else None
    return a.energy_pj / b.energy_pj, area


def _file() -> dict:
    return tomllib.loads((resources.files("shiftaddvit.cost") / "primitives.toml").read_text())
