"""A table as data, and as Markdown, LaTeX and CSV."""

import csv
import io
from dataclasses import dataclass
from typing import Literal

CellKind = Literal["published", "measured", "modelled", "not run", "none", "text"]
MARKS = {"published": "P", "measured": "M", "modelled": "E", "not run": "", "none": "", "text": ""}
"""One letter each, so that no difference depends on colour: E for an estimate."""


@dataclass(frozen=True)
class Cell:
    """One number or text, and which of the four words it goes by."""

    kind: CellKind
    """`none`: there is no such number; `text`: no number at all."""
    text: str
    """As it is shown."""
    value: float | None = None
    """To sort by."""
    note: str = ""
    """Conditions, in a line."""


NOT_RUN = Cell("not run", "not run")
NONE = Cell("none", "–")


def words(text: str, note: str = "") -> Cell:
    """A cell without a number."""
    return Cell("text", text, None, note)


def signed(value: float) -> str:
    """A change, with two digits and its sign, none where there is no change."""
    text = f"{value:+.2f}".replace("-", "−")
    return text[1:] if float(f"{value:.2f}") == 0 else text


@dataclass(frozen=True)
class Column:
    """What a column holds."""

    title: str
    """Its heading."""
    group: str = ""
    """Heading over several columns: where their numbers come from."""
    numeric: bool = True
    """Whether it is aligned and sorted as numbers."""
    better: Literal["higher", "lower", ""] = ""
    """Which end is good."""
    note: str = ""
    """What its numbers are, in a line, where the title does not say it."""


@dataclass(frozen=True)
class Table:
    """Rows of cells under columns."""

    id: str
    """For files and links."""
    title: str
    """Its caption."""
    columns: tuple[Column, ...]
    """In order."""
    rows: tuple[tuple[Cell, ...], ...]
    """As many cells as columns."""
    notes: tuple[str, ...] = ()
    """Below it."""

    @property
    def groups(self) -> tuple[tuple[str, int], ...]:
        """(heading, columns under it), left to right."""
        found: list[tuple[str, int]] = []
        for column in self.columns:
            if found and found[-1][0] == column.group:
                found[-1] = (column.group, found[-1][1] + 1)
            else:
                found.append((column.group, 1))
        return tuple(found)

    def headings(self) -> list[str]:
        """One heading a column, with its group."""
        return [f"{column.title} ({column.group})" if column.group else column.title for column in self.columns]


@dataclass(frozen=True)
class Tile:
    """One number that stands for much."""

    number: str
    """Large."""
    text: str
    """What it is."""
    kind: str
    """Which of the four words it goes by."""


LEGEND = "(P) published, (M) measured, (E) modelled: computed, never measured."


def as_markdown(table: Table) -> str:
    """For a README or an issue."""
    lines = [f"**{_markdown(table.title)}**", "", "| " + " | ".join(map(_markdown, table.headings())) + " |"]
    lines.append("|" + "|".join("---:" if column.numeric else "---" for column in table.columns) + "|")
    lines += ["| " + " | ".join(_markdown(_marked(cell)) for cell in row) + " |" for row in table.rows]
    return "\n".join([*lines, "", LEGEND, *(f"{_markdown(note)}" for note in table.notes)]) + "\n"


def as_csv(table: Table) -> str:
    """One row a line; every numeric column is followed by one that says where its number comes from."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    heads: list[str] = []
    for column, heading in zip(table.columns, table.headings(), strict=True):
        heads += [_no_formula(heading), f"{_no_formula(heading)}: source"] if column.numeric else [_no_formula(heading)]
    writer.writerow(heads)
    for row in table.rows:
        line: list[str] = []
        for column, cell in zip(table.columns, row, strict=True):
            shown = repr(cell.value) if cell.value is not None else "" if cell.kind in ("not run", "none") else cell.text
            line += [_no_formula(shown), cell.kind] if column.numeric else [_no_formula(cell.text)]
        writer.writerow(line)
    return file.getvalue()


def as_latex(table: Table) -> str:
    """A booktabs table: published numbers in italics, modelled ones with an E."""
    form = "".join("r" if column.numeric else "l" for column in table.columns)
    lines = [r"\begin{table}", r"\centering", rf"\caption{{{_latex(table.title)}}}", rf"\begin{{tabular}}{{{form}}}", r"\toprule"]
    if any(group for group, _ in table.groups):
        lines.append(" & ".join(rf"\multicolumn{{{count}}}{{c}}{{{_latex(group)}}}" for group, count in table.groups) + r" \\")
    lines += [" & ".join(_latex(column.title) for column in table.columns) + r" \\", r"\midrule"]
    lines += [" & ".join(map(_latex_cell, row)) + r" \\" for row in table.rows]
    lines += [
        r"\bottomrule",
        r"\end{tabular}",
        r"\par\footnotesize\textit{Italics}: published; upright: measured; $^\mathrm{E}$: modelled, that is computed, never measured.",
    ]
    return "\n".join([*lines, *(rf"\par {_latex(note)}" for note in table.notes), r"\end{table}"]) + "\n"


def _marked(cell: Cell) -> str:
    return f"{cell.text} ({MARKS[cell.kind]})" if MARKS[cell.kind] else cell.text


def _markdown(text: str) -> str:
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("`", "\\`")


def _no_formula(text: str) -> str:
    """A spreadsheet runs what begins like a formula, and texts come from files."""
    return f"'{text}" if text[:1] in ("=", "@", "+", "\t", "\r") or (text[:1] == "-" and not _is_number(text)) else text


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}", "–": "--", "−": "$-$", "×": r"$\times$", "±": r"$\pm$", "…": r"\ldots{}", "µ": r"$\mu$", "→": r"$\to$", "²": "$^2$",
    "▸": r"$\triangleright$", "≤": r"$\le$", "·": r"$\cdot$", "“": "``", "”": "''", "’": "'", "†": r"$^\dagger$",
}  # fmt: skip


def _latex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in " ".join(text.split()))


def _latex_cell(cell: Cell) -> str:
    text = _latex(cell.text)
    return {"published": rf"\textit{{{text}}}", "modelled": rf"{text}$^\mathrm{{E}}$", "not run": r"\textcolor{gray}{not run}"}.get(cell.kind, text)
