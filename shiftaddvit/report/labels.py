"""Where labels go beside marks: for the page and for papers alike."""

from collections.abc import Iterable

Box = tuple[float, float, float, float]
"""Left, top, right, bottom, in units of the drawing, y downwards."""


def placed(
    marks: Iterable[tuple[float, float, str]], everything: Iterable[tuple[float, float]], inside: Box, em: float
) -> list[tuple[float, float, str]]:
    """(left, baseline, text) of each label of `marks` (x, y, label) that has a place inside where it covers no mark of `everything` and no
    other label; the others are left out. `em` is the width of a letter."""
    high, gap = 1.9 * em, 1.15 * em
    taken: list[Box] = [(x - gap, y - gap, x + gap, y + gap) for x, y in everything]
    found = []
    for x, y, label in sorted((mark for mark in marks if mark[2]), key=lambda mark: mark[1]):
        shown = label if len(label) <= 30 else label[:29] + "…"
        width = em * len(shown)
        aside, above, below = 1.7 * em, -1.9 * em, 3 * em
        for dx, dy in ((aside, 0.6 * em), (-aside - width, 0.6 * em), (-width / 2, above), (-width / 2, below), (aside, above), (aside, below),
                       (-aside - width, above), (-aside - width, below)):  # fmt: skip
            box = (x + dx, y + dy - high + 0.4 * em, x + dx + width, y + dy + 0.4 * em)
            within = box[0] >= inside[0] and box[1] >= inside[1] and box[2] <= inside[2] and box[3] <= inside[3]
            if within and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                found.append((x + dx, y + dy, shown))
                break
    return found


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
