"""One page from result files: what was published, what was measured, and which image regions multiply. Never looks at a model."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from shiftaddvit.files import atomic_write

from .contents import content
from .figures import write_figures
from .page import render
from .reading import read_results
from .results import Skipped

__all__ = ["Written", "write_report"]


@dataclass(frozen=True)
class Written:
    """What a report came to."""

    page: Path
    """The HTML file."""
    bytes: int
    """Its size."""
    files: int
    """Result files used."""
    skipped: tuple[Skipped, ...]
    """What was left out, and why."""
    figures: tuple[Path, ...]
    """Files for papers."""


def write_report(paths: Iterable[str | Path], output: str | Path, *, title: str | None = None, figures: str | Path | None = None) -> Written:
    """Read result files (or folders of them) and write the page to `output`, and with `figures` every chart as SVG and PNG and every table
    as Markdown, LaTeX and CSV into that folder. UserError where a path does not exist or there are no results."""
    paths = list(paths)
    found = content(read_results(paths))
    text = render(found, title or f"Results of {', '.join(dict.fromkeys(Path(path).resolve().name for path in paths))}")
    drawn = write_figures(found, Path(figures)) if figures is not None else []
    with atomic_write(output) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Written(Path(output), len(text.encode()), len(found.results.sources), tuple(found.results.skipped), tuple(drawn))
