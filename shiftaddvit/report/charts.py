"""Charts as data: what `svg` draws into the page and `figures` for papers."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Point:
    """One mark."""

    x: float
    """Across."""
    y: float
    """Up."""
    label: str
    """Beside it."""
    detail: str = ""
    """When pointed at."""
    low: float | None = None
    """Lower end of the interval of y."""
    high: float | None = None
    """Upper end."""


@dataclass(frozen=True)
class Series:
    """Points of one kind."""

    name: str
    """In the legend."""
    points: tuple[Point, ...]
    """In any order."""


@dataclass(frozen=True)
class Scatter:
    """A trade-off: each point one model; the front is what no other point beats in both."""

    id: str
    """For files and links."""
    title: str
    """Above it."""
    x_label: str
    """With unit; less is better."""
    y_label: str
    """With unit; more is better."""
    sources: tuple[Literal["published", "measured", "modelled"], ...]
    """Whose numbers; published and measured never together."""
    series: tuple[Series, ...]
    """At most four."""
    about: str = ""
    """Network and data, below the title."""
    log_x: bool = False
    """Whether the x axis is logarithmic."""


@dataclass(frozen=True)
class Bars:
    """Stacked horizontal bars."""

    id: str
    """For files and links."""
    title: str
    """Above it."""
    unit: str
    """Of the values."""
    parts: tuple[str, ...]
    """Names of the parts, in order."""
    rows: tuple[tuple[str, tuple[float, ...]], ...]
    """(label, one value a part)."""
    whole: float | None = None
    """What a full bar is; None for the largest row."""


@dataclass(frozen=True)
class Lines:
    """Curves over a common axis."""

    id: str
    """For files and links."""
    title: str
    """Above it."""
    x_label: str
    """With unit."""
    y_label: str
    """With unit."""
    series: tuple[Series, ...]
    """Points by x."""


Chart = Scatter | Bars | Lines


def front(points: tuple[Point, ...]) -> tuple[Point, ...]:
    """The points that no other has both less x and more y than, by x."""
    found: list[Point] = []
    for point in sorted(points, key=lambda point: (point.x, -point.y)):
        if not found or point.y > found[-1].y:
            found.append(point)
    return tuple(found)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from `low` to `high`."""
    span = high - low or abs(high) or 1.0
    rough = span / count
    power = 10.0 ** _exponent(rough)
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first = -(-low // step)
    return [round((first + number) * step, 12) for number in range(int((high - first * step) / step + 1e-9) + 1)]


def _exponent(value: float) -> int:
    from math import floor, log10

    return floor(log10(value))
