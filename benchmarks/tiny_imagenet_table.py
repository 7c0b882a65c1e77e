"""The measured table from result files, every row paired with the dense control of the same seed on the same images.

    python benchmarks/tiny_imagenet_table.py results/tiny_imagenet --arch pvt_v2_b0 [--control dense-ft]

The folder holds result files by the name of their run, or is the OUT of tiny_imagenet_all.py; `--copy` keeps the latter's as the former.
"""

import argparse
import json
import re
import shutil
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


def files(folder: Path, arch: str) -> dict[str, Path]:
    """Result files by run."""
    return {path.parent.name: path for path in sorted(folder.glob(f"{arch}-*/result.json"))} | {path.stem: path for path in sorted(folder.glob(f"{arch}-*.json"))}


def read(folder: Path, arch: str) -> dict[str, dict[int, Evaluation]]:
    """Row name → seed → evaluation, for the files `{arch}-{row}-s{seed}.json` or `{arch}-{row}-s{seed}/result.json`."""
    found: dict[str, dict[int, Evaluation]] = {}
    for run, path in files(folder, arch).items():
        match = NAME.match(run)
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
    parser.add_argument("--copy", type=Path, help="copy the result files here, each by the name of its run")
    args = parser.parse_args()
    if args.copy is not None:
        args.copy.mkdir(parents=True, exist_ok=True)
        for run, path in files(args.folder, args.arch).items():
            shutil.copyfile(path, args.copy / f"{run}.json")
    print(f"| {args.arch} row | top-1 % | seeds | against {args.control}, points |\n|---|---|---|---|")
    for row in rows(read(args.folder, args.arch), args.control):
        difference = "" if row.difference is None else f"{row.difference:+.2f} ± {row.half_width:.2f}"
        print(f"| {row.name} | {row.top1:.2f} | {row.seeds} | {difference} |")


if __name__ == "__main__":
    main()
