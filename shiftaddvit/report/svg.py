"""Charts as SVG inside the page: colours come from its style sheet by class, every mark can be pointed at and reached by keyboard, and
there is no style attribute, which the page's security policy forbids. Every text is escaped."""

from collections.abc import Iterable
from html import escape
from math import log10

from .charts import Bars, Chart, Lines, Matrix, Point, Scatter, Square, front, ticks
from .labels import placed

WIDTH, BAR_WIDTH = 620, 720
"""Of charts with axes, and of bars."""


def draw(chart: Chart) -> str:
    """One `<svg>` element."""
    if isinstance(chart, Bars):
        return _bars(chart)
    if isinstance(chart, Matrix):
        return _matrix(chart)
    return _scatter(chart) if isinstance(chart, Scatter) else _lines(chart)


def number(value: float) -> str:
    """Three significant digits, without exponents where it can be."""
    if value == 0:
        return "0"
    digits = max(0, 2 - int(log10(abs(value)) // 1)) if abs(value) < 1000 else 0
    text = f"{value:.{min(digits, 6)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else f"{value:,.0f}"


def alike(values: list[float]) -> list[tuple[float, str]]:
    """Numbers along one axis with their texts, all with as many decimals as the one that needs most."""
    decimals = max((len(f"{value:.6f}".rstrip("0").partition(".")[2]) for value in values), default=0)
    return [(value, f"{value:,.{decimals}f}".replace("-", "−")) for value in values]


def _frame(chart: Chart, height: float, body: Iterable[str], about: str, width: int = WIDTH) -> str:
    name = escape(chart.id)
    return (
        f'<svg class="chart" viewBox="0 0 {width} {height:g}" role="group" aria-labelledby="{name}-t {name}-d">'
        f'<title id="{name}-t">{escape(chart.title)}</title><desc id="{name}-d">{escape(about)}</desc>{"".join(body)}</svg>'
    )


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">{escape(text)}</text>'


def _mark(shape: str, kind: str, detail: str) -> str:
    """A shape with what the pointer, the keyboard and a screen reader get of it."""
    told = escape(detail)
    return f'<g class="mark {kind}" tabindex="0" role="img" aria-label="{told}" data-tip="{told}">{shape}</g>'


class _Axes:
    """From values to places, with the grid and its numbers."""

    top, bottom = 16, 52

    def __init__(self, xs: list[float], ys: list[float], height: float, log_x: bool, right: float = 24):
        self.height, self.log_x, self.right = height, log_x, right
        pad = 0.08 * (max(ys) - min(ys)) or 1.0
        self.y_low, self.y_high = min(ys) - pad, max(ys) + pad
        if log_x:
            self.x_low, self.x_high = log10(min(xs)) - 0.08, log10(max(xs)) + 0.12
        else:
            room = 0.06 * (max(xs) - min(xs)) or abs(max(xs)) * 0.1 or 1.0
            self.x_low, self.x_high = min(xs) - room, max(xs) + room
            if min(xs) >= 0 and self.x_low < 0:
                self.x_low = 0.0

        self.y_ticks = alike(ticks(self.y_low, self.y_high, 6))
        self.left = 40 + 6.8 * max((len(text) for _, text in self.y_ticks), default=0)

    def x(self, value: float) -> float:
        at = log10(value) if self.log_x else value
        return self.left + (WIDTH - self.left - self.right) * (at - self.x_low) / (self.x_high - self.x_low)

    def y(self, value: float) -> float:
        return self.height - self.bottom - (self.height - self.top - self.bottom) * (value - self.y_low) / (self.y_high - self.y_low)

    def draw(self, x_label: str, y_label: str) -> list[str]:
        parts = []
        for tick, text in self.y_ticks:
            parts.append(f'<line class="grid" x1="{self.left}" x2="{WIDTH - self.right}" y1="{self.y(tick):.1f}" y2="{self.y(tick):.1f}"/>')
            parts.append(_text(self.left - 8, self.y(tick) + 4, text, "tick", "end"))
        for tick, text in self._x_ticks():
            parts.append(f'<line class="grid" x1="{self.x(tick):.1f}" x2="{self.x(tick):.1f}" y1="{self.top}" y2="{self.height - self.bottom}"/>')
            parts.append(_text(self.x(tick), self.height - self.bottom + 18, text, "tick", "middle"))
        middle = (self.top + self.height - self.bottom) / 2
        parts.append(_text((self.left + WIDTH - self.right) / 2, self.height - 12, x_label, "axis", "middle"))
        parts.append(f'<text class="axis" text-anchor="middle" transform="translate(16 {middle:.0f}) rotate(-90)">{escape(y_label)}</text>')
        return parts

    def _x_ticks(self) -> list[tuple[float, str]]:
        if not self.log_x:
            return alike(ticks(self.x_low, self.x_high, 7))
        found = [m * 10.0**e for e in range(int(self.x_low) - 1, int(self.x_high) + 2) for m in (1, 2, 5)]
        return [(tick, number(tick)) for tick in found if self.x_low <= log10(tick) <= self.x_high]


_SHAPES = (
    '<circle cx="{x:.1f}" cy="{y:.1f}" r="6"/>',
    '<path d="M{x:.1f} {y:.1f}m-6 -6h12v12h-12z"/>',
    '<path d="M{x:.1f} {y:.1f}m0 -8l8 8l-8 8l-8 -8z"/>',
    '<path d="M{x:.1f} {y:.1f}m0 -7l7 12h-14z"/>',
)


def _scatter(chart: Scatter) -> str:
    height = 380.0
    points = [point for series in chart.series for point in series.points]
    ys = [y for point in points for y in (point.y, point.low, point.high) if y is not None]
    axes = _Axes([point.x for point in points], ys, height, chart.log_x)
    body = axes.draw(chart.x_label, chart.y_label)
    labels = []
    for index, series in enumerate(chart.series):
        kind, best = f"s{index}", front(series.points, chart.less_is_better) if series.joined else ()
        corners = "".join(f"H{axes.x(point.x):.1f}V{axes.y(point.y):.1f}" for point in best[1:])
        if best:
            body.append(f'<path class="front {kind}" d="M{axes.x(best[0].x):.1f} {axes.y(best[0].y):.1f}{corners}"/>')
        for point in series.points:
            x, y = axes.x(point.x), axes.y(point.y)
            shape = _SHAPES[index % len(_SHAPES)].format(x=x, y=y)
            if point.low is not None and point.high is not None:
                shape = f'<line class="bar" x1="{x:.1f}" x2="{x:.1f}" y1="{axes.y(point.low):.1f}" y2="{axes.y(point.high):.1f}"/>' + shape
            body.append(_mark(shape, kind + (" best" if point in best else ""), f"{point.label}: {point.detail}"))
            labels.append((x, y, point.label if series.labelled else ""))
    room = (axes.left + 2.0, 2.0, WIDTH - 2.0, height - axes.bottom)
    body += [_text(x, y, label, "label") for x, y, label in placed(labels, [mark[:2] for mark in labels], room, 7.0)]
    about = (
        f"{len(points)} points, {chart.y_label} against {chart.x_label}; the stepped line joins the points that no other beats in both. "
        "Values in the table below."
    )
    return _frame(chart, height, body, about)


def _lines(chart: Lines) -> str:
    height = 340.0
    points = [point for series in chart.series for point in series.points]
    axes = _Axes([point.x for point in points], [point.y for point in points], height, False)
    body = axes.draw(chart.x_label, chart.y_label)
    for index, series in enumerate(chart.series):
        path = "L".join(f"{axes.x(point.x):.1f} {axes.y(point.y):.1f}" for point in series.points)
        body.append(f'<path class="curve s{index % 8} d{index // 8}" d="M{path}"/>')
        body += [_dot(axes, point, index, series.name) for point in _thinned(series.points)]
    about = f"{len(chart.series)} curves of {chart.y_label} over {chart.x_label}."
    return _frame(chart, height, body, about)


def _thinned(points: tuple[Point, ...], most: int = 24) -> tuple[Point, ...]:
    step = max(1, len(points) // most)
    return points[::step] if (len(points) - 1) % step == 0 else (*points[::step], points[-1])


def _dot(axes: _Axes, point: Point, index: int, name: str) -> str:
    shape = f'<circle cx="{axes.x(point.x):.1f}" cy="{axes.y(point.y):.1f}" r="3"/>'
    return _mark(shape, f"s{index % 8} dot", f"{name}: {number(point.y)} at {number(point.x)}")


def _bars(chart: Bars) -> str:
    longest = max((len(label) for label, _ in chart.rows), default=0)
    left = min(300.0, 14 + 6.6 * longest)
    row, top = 24, 8
    most = chart.whole or max((sum(values) for _, values in chart.rows), default=0.0) or 1.0
    scale = (BAR_WIDTH - left - 78) / most
    height = top + row * len(chart.rows) + 10
    body = []
    for line, (label, values) in enumerate(chart.rows):
        y, x = top + row * line, left
        shown = label if len(label) <= 43 else "…" + label[-42:]
        body.append(_text(left - 8, y + 15, shown, "label", "end"))
        for index, (part, value) in enumerate(zip(chart.parts, values, strict=True)):
            width = value * scale
            if width > 0:
                detail = f"{label}, {part}: {number(value)} {chart.unit}"
                body.append(_mark(f'<rect x="{x:.2f}" y="{y + 2}" width="{width:.2f}" height="{row - 6}"/>', f"p{index}", detail))
            x += width
        total = values[-1] if chart.whole else sum(values)
        body.append(_text((left + scale * chart.whole if chart.whole else x) + 6, y + 15, f"{number(total)} {chart.unit}", "tick"))
    about = f"{len(chart.rows)} bars, each stacked from {', '.join(chart.parts)}, in {chart.unit}."
    return _frame(chart, height, body, about, BAR_WIDTH)


def _matrix(chart: Matrix) -> str:
    """Layers down, recipes across: the colour and the sign say who computes the linear layers, the word which attention it is."""
    left, cell, row = 14 + 6.6 * max(len(label) for label, _ in chart.rows), 82.0, 26
    heads = [column.split("-") for column in chart.columns]
    top = 14 + 14 * max(map(len, heads))
    width, height = left + cell * len(heads) + 8, top + row * len(chart.rows) + 6
    body = []
    for number, pieces in enumerate(heads):
        for line, piece in enumerate(pieces):
            shown = piece if line == len(pieces) - 1 else f"{piece}-"
            y = top - 8 - 14 * (len(pieces) - 1 - line)
            body.append(_text(left + cell * (number + 0.5), y, shown, "label first" if number == 0 else "label", "middle"))
    for line, (label, squares) in enumerate(chart.rows):
        y = top + row * line
        body.append(_text(left - 8, y + 16, label, "label", "end"))
        body += [_mark(_square(left + cell * number, y, cell, row, square), "square", square.detail) for number, square in enumerate(squares)]
    about = f"{len(chart.rows)} layers under {len(chart.columns)} recipes. Values in the table below."
    return _frame(chart, height, body, about, width)


def _square(x: float, y: float, cell: float, row: float, square: Square) -> str:
    """Half of each colour where tokens divide."""
    wide, high = cell - 4, row - 4
    whole = f'<rect class="on-{square.kind}" x="{x + 2:.1f}" y="{y:.1f}" width="{wide:.1f}" height="{high:.1f}" rx="3"/>'
    if square.kind == "moe":
        whole = (
            f'<path class="on-mult" d="M{x + 2:.1f} {y:.1f}h{wide:.1f}l-{wide:.1f} {high:.1f}z"/>'
            f'<path class="on-shift" d="M{x + 2 + wide:.1f} {y:.1f}v{high:.1f}h-{wide:.1f}z"/>'
        )
    return whole + _text(x + cell / 2, y + 15.5, square.text, "in-square", "middle")
