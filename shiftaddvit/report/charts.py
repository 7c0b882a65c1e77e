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
    joined: bool = True
    """Whether those that no other beats are joined by a line; otherwise each stands for itself."""
    labelled: bool = True
    """Whether labels stand beside the marks, or are told when a mark is pointed at."""


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
    """With unit; more is better, unless `less_is_better`."""
    sources: tuple[Literal["published", "measured", "modelled"], ...]
    """Whose numbers; published and measured never together."""
    series: tuple[Series, ...]
    """At most four."""
    about: str = ""
    """Network and data, below the title."""
    log_x: bool = False
    """Whether the x axis is logarithmic."""
    less_is_better: bool = False
    """Whether the y axis too is something to have little of."""


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
class Square:
    """One cell of a matrix."""

    text: str
    """In it."""
    kind: Literal["mult", "shift", "moe"]
    """Its colour: multiplication, shift, or both."""
    detail: str
    """When pointed at."""


@dataclass(frozen=True)
class Matrix:
    """What each layer becomes under several recipes."""

    id: str
    """For files and links."""
    title: str
    """Above it."""
    columns: tuple[str, ...]
    """One a recipe."""
    rows: tuple[tuple[str, tuple[Square, ...]], ...]
    """(layer, one square a recipe)."""
    about: str = ""
    """Below the title."""


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


Chart = Scatter | Bars | Lines | Matrix


def front(points: tuple[Point, ...], less_is_better: bool = False) -> tuple[Point, ...]:
    """The points that no other has both less x and more y (or less y too) than, by x."""
    sign = -1 if less_is_better else 1
    found: list[Point] = []
    for point in sorted(points, key=lambda point: (point.x, -sign * point.y)):
        if not found or sign * point.y > sign * found[-1].y:
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
