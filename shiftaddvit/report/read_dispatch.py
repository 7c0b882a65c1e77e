"""Reader of dispatch files: pictures, and one digit for each token."""

import re

from .dispatched import DispatchResult, Mixture, Picture
from .fields import Fields
from .networks import recipe_name
from .results import Results
from .sources import Source

_IMAGE = re.compile(r"data:image/(?:png|jpeg|webp);base64,[A-Za-z0-9+/]+={0,2}\Z")
"""Pictures of points only: an SVG could hold a script."""


def read_dispatch(values: Fields, source: Source, found: Results) -> None:
    """One model over some images."""
    mixtures = tuple(_mixture(entry) for entry in values.each("layers"))
    if not mixtures:
        values.fail("has no layers")
    pictures = tuple(_picture(entry, mixtures) for entry in values.each("pictures"))
    model, name = values.fields("model").text("name"), recipe_name(values.values.get("recipe"))
    found.dispatches.append(DispatchResult(f"{model}, {name}", values.word("data"), values.count("images", 1), mixtures, pictures, source))


def _mixture(entry: Fields) -> Mixture:
    experts = tuple(entry.list("experts"))
    if not 2 <= len(experts) <= 10 or not set(experts) <= {"mult", "shift"}:
        entry.fail("'experts' must be two to ten of 'mult' and 'shift'")
    tokens, prefix, grid = entry.count("tokens", 1), entry.count("prefix"), entry.values.get("grid")
    if grid is not None:
        sides = [int(side) for side in entry.numbers("grid", 1, 4096)]
        if len(sides) != 2 or sides[0] * sides[1] + prefix != tokens:
            entry.fail(f"a grid of {' × '.join(map(str, sides))} and {prefix} more are not {tokens} tokens")
        grid = (sides[0], sides[1])
    share = entry.numbers("share", 0, 1)
    if len(share) != len(experts):
        entry.fail("'share' and 'experts' differ in length")
    entry.agree("share", sum(share), 1.0)
    return Mixture(entry.text("name"), experts, grid, prefix, tokens, share)


def _picture(entry: Fields, mixtures: tuple[Mixture, ...]) -> Picture:
    image, experts = entry.text("image"), entry.fields("experts")
    if not _IMAGE.match(image):
        entry.fail("'image' must be a PNG, JPEG or WebP as a data URI")
    chosen = {}
    for mixture in mixtures:
        digits = experts.text(mixture.name)
        allowed = "0123456789"[: len(mixture.experts)]
        if len(digits) != mixture.tokens or not set(digits) <= set(allowed):
            entry.fail(f"experts of {mixture.name}: needs {mixture.tokens} digits of {allowed}")
        chosen[mixture.name] = digits
    size = entry.count("height", 1), entry.count("width", 1)
    return Picture(entry.text("name"), image, size, entry.word("label"), entry.text("predicted"), chosen)
