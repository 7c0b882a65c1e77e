"""Token maps: rectangles over a picture, and the table of mixtures from which one is chosen."""

from dataclasses import dataclass

from .dispatched import DispatchResult, Mixture

_WORDS = {
    "qkv": "q, k, v", "q": "q", "k": "k", "v": "v", "kv": "k, v", "proj": "projection", "fc1": "MLP in", "fc2": "MLP out", "mlp": "MLP",
    "attn": "attention",
}  # fmt: skip


FINEST_LINES = 28
"""Tokens on a side of a grid with lines; `page.js` has the same."""


@dataclass(frozen=True)
class Choice:
    """One cell of the table of mixtures."""

    index: int
    """Of the mixture."""
    label: str
    """For people: block and linear."""
    tenth: int
    """Share on shift in tenths, 0 to 10: its shade."""
    percent: int
    """Share on shift, rounded."""


@dataclass(frozen=True)
class ChoiceTable:
    """Blocks down, linears across."""

    columns: tuple[str, ...]
    """Headings."""
    rows: tuple[tuple[str, tuple[Choice | None, ...]], ...]
    """(block, its mixtures by column)."""


def cells(mixture: Mixture, digits: str, kind: str) -> str:
    """SVG path data, in units of tokens, of the tokens whose expert is of this kind; runs along a row are one rectangle."""
    rows, columns = mixture.grid
    wanted = [mixture.experts[int(digit)] == kind for digit in digits[mixture.prefix :]]
    path = []
    for row in range(rows):
        column = 0
        while column < columns:
            start = column
            while column < columns and wanted[row * columns + column]:
                column += 1
            if column > start:
                path.append(f"M{start} {row}h{column - start}v1h-{column - start}z")
            column += 1
    return "".join(path)


def grid_lines(mixture: Mixture) -> str:
    """SVG path data of the lines between tokens; none on a grid so fine that they would hide it."""
    rows, columns = mixture.grid
    if max(rows, columns) > FINEST_LINES:
        return ""
    return "".join(f"M0 {row}h{columns}" for row in range(1, rows)) + "".join(f"M{column} 0v{rows}" for column in range(1, columns))


def percent_on_shift(mixture: Mixture, digits: str) -> int:
    """Of one picture's tokens."""
    return round(100 * sum(mixture.experts[int(digit)] == "shift" for digit in digits) / len(digits))


def block_and_linear(name: str) -> tuple[str, str]:
    """`stages.1.blocks.0.attn.qkv` is (stage 2 · block 1, q, k, v)."""
    pieces = name.split(".")
    numbers = [number for number, piece in enumerate(pieces) if piece.isdigit()]
    if not numbers:
        return name, "all"
    end = numbers[-1] + 1
    block = []
    for piece, number in zip(pieces[:end:2], pieces[1:end:2], strict=False):
        block.append(
            f"{ {'stages': 'stage', 'blocks': 'block', 'layers': 'layer'}.get(piece, piece) } {int(number) + 1 if number.isdigit() else number}"
        )
    rest = [piece for piece in pieces[end:] if piece not in ("attn", "mlp")] or pieces[end:]
    return " · ".join(block) or name, " ".join(_WORDS.get(piece, piece) for piece in rest) or "all"


def in_words(name: str) -> str:
    """`stages.1.blocks.0.attn` is `stage 2 · block 1, attention`; a name without a number stays as it is."""
    return ", ".join(block_and_linear(name)) if any(piece.isdigit() for piece in name.split(".")) else name


def choice_table(found: DispatchResult) -> ChoiceTable:
    """All mixtures, in the order of execution down the rows."""
    columns: dict[str, None] = {}
    rows: dict[str, dict[str, Choice]] = {}
    for index, mixture in enumerate(found.mixtures):
        block, linear = block_and_linear(mixture.name)
        columns[linear] = None
        share = mixture.shift_share
        rows.setdefault(block, {})[linear] = Choice(index, f"{block}, {linear}", round(10 * share), round(100 * share))
    usual = list(_WORDS.values())
    ordered = sorted(columns, key=lambda word: usual.index(word) if word in usual else len(usual))
    return ChoiceTable(tuple(ordered), tuple((block, tuple(found.get(column) for column in ordered)) for block, found in rows.items()))


def first_choice(found: DispatchResult) -> int:
    """The mixture to begin with: the finest grid, and of these the one that divides the tokens most evenly."""
    drawn = [index for index, mixture in enumerate(found.mixtures) if mixture.grid]
    return max(drawn, key=lambda i: (found.mixtures[i].tokens, -abs(found.mixtures[i].shift_share - 0.5)), default=0)
