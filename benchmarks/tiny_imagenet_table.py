"""The measured table from result files, every row paired with the dense control of the same seed on the same images.

    python benchmarks/tiny_imagenet_table.py results/tiny_imagenet --arch pvt_v2_b0 [--control dense-ft]
"""

import argparse
import json
import re
from dataclasses import dataclass
from math import sqrt
from pathlib import Path

from shiftaddvit.evaluation import Evaluation, compare

NAME = re.compile(r"(?P<arch>.+)-s(?P<seed>\d+)$")


@dataclass(frozen=True)
class Row:
    """One recipe over its seeds."""

    name: str
    """Row name in the file names."""
    top1: float
    """Mean over seeds, in %."""
    seeds: int
    """How many."""
    difference: float | None
    """Against the control, in points, mean over seeds."""
    half_width: float | None
    """Half of the paired 95 % interval of that mean: images are shared by the seeds, so it is not divided by √seeds."""


def read(folder: Path, arch: str) -> dict[str, dict[int, Evaluation]]:
    """Row name → seed → evaluation, for the files `{arch}-{row}-s{seed}.json`."""
    found: dict[str, dict[int, Evaluation]] = {}
    for path in sorted(folder.glob(f"{arch}-*.json")):
        match = NAME.match(path.stem)
        values = json.loads(path.read_text())
        if match is None or not values.get("evaluation"):
            continue
        row = match["arch"].removeprefix(f"{arch}-")
        found.setdefault(row, {})[int(match["seed"])] = Evaluation.from_json(values["evaluation"])
    return found


def rows(found: dict[str, dict[int, Evaluation]], control: str) -> list[Row]:
    """The table's rows, best first."""
    table = []
    for name, seeds in found.items():
        mean = sum(e.top1 for e in seeds.values()) / len(seeds)
        shared = [compare(e, found[control][seed]) for seed, e in seeds.items() if seed in found.get(control, {})]
        difference = half = None
        if shared and name != control:
            difference = sum(p.difference for p in shared) / len(shared)
            half = sqrt(sum(((p.interval95[1] - p.interval95[0]) / 2) ** 2 for p in shared) / len(shared))
        table.append(Row(name, mean, len(seeds), difference, half))
    return sorted(table, key=lambda row: -row.top1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--arch", default="pvt_v2_b0")
    parser.add_argument("--control", default="dense-ft")
    args = parser.parse_args()
    print(f"| {args.arch} row | top-1 % | seeds | against {args.control}, points |\n|---|---|---|---|")
    for row in rows(read(args.folder, args.arch), args.control):
        difference = "" if row.difference is None else f"{row.difference:+.2f} ± {row.half_width:.2f}"
        print(f"| {row.name} | {row.top1:.2f} | {row.seeds} | {difference} |")


if __name__ == "__main__":
    main()
