"""Searched recipes against the shipped rows at equal energy: shared by the scripts that say which model and images.

For every shipped row that the search can express: the recipe of least damage at that row's energy is searched, both are fine-tuned with one
budget, and both are evaluated on the same test images, in pairs. Sensitivities are measured on development images only. Everything is
resumable: a file that is there is not made again, and one of another model is refused.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

from shiftaddvit.autorecipe import Budget, Goal, Tables, additivity, energy_table, options_of, solve
from shiftaddvit.autorecipe.costs import read_json
from shiftaddvit.autorecipe.options import SEARCHED, changes
from shiftaddvit.conditions import conditions
from shiftaddvit.cost.estimate import model_energy
from shiftaddvit.errors import UserError
from shiftaddvit.evaluation import Evaluation, compare
from shiftaddvit.evaluation.sensitivity import Sensitivity, sensitivity
from shiftaddvit.files import atomic_write, write_json
from shiftaddvit.reparam import Recipe, recipes, reparameterize
from shiftaddvit.reparam.architecture import architecture_of
from shiftaddvit.reparam.identity import identity
from shiftaddvit.schema import stamped
from shiftaddvit.train import FinetuneConfig, finetune

Loader = Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Setup:
    """One model, its images and how every recipe is fine-tuned."""

    dense: Callable[[], nn.Module]
    """The pre-trained model, anew each time."""
    image_size: tuple[int, int]
    """Height and width."""
    dev: Loader
    """Images for the search, in a fixed order; never the test images."""
    train: Callable[[int], Loader]
    """Training images, by seed; without those of `dev`."""
    test: Callable[[], Loader]
    """Images of the final comparison."""
    config: Callable[[int], FinetuneConfig]
    """Fine-tuning, by seed."""
    settings: Recipe = Recipe()
    """How primitives are made."""
    amp_dtype: torch.dtype | None = None
    """For evaluation."""
    device: str = "cpu"
    """Where everything runs."""
    about: str = ""
    """Which images are which, for the result file."""


def run(setup: Setup, out: Path, seeds: tuple[int, ...] = (0,), only: tuple[str, ...] = (), check: int = 30) -> dict[str, Any]:
    """All steps; returns and writes `out/table.json`."""
    dense = setup.dense().to(setup.device).eval()
    options = options_of(dense, SEARCHED, setup.settings)
    damage = _damage(setup, dense, options, out / "sensitivity.json")
    tables = Tables(options, damage, (energy_table(dense, options, setup.settings, image_size=setup.image_size),))
    kept = out / "additivity.json"
    if check and not kept.exists():
        found = additivity(dense, setup.dev, tables.menu, damage, count=check, device=setup.device, amp_dtype=setup.amp_dtype)
        write_json(kept, found.to_json() | {"conditions": conditions(setup.device, images=setup.about)})
        print("rank correlation of sums and measurements:", found.rank_correlation, flush=True)
    goal = Goal(("kl", "energy"), "kl", "energy")
    everything = solve(tables, [], goal)
    about = {"model": asdict(architecture_of(dense)), "data": setup.about, "split": "dev"}
    write_json(out / "front.json", stamped("search", about | everything.to_json()))
    rows = []
    for name, point in sorted(everything.rows.items(), key=lambda entry: -entry[1].totals["energy"]):
        if only and name not in only:
            continue
        found = solve(tables, [Budget("energy", point.totals["energy"])], goal, points=1)
        path = out / f"at-{name}.toml"
        with atomic_write(path) as temporary:
            temporary.write_text(found.recipe.to_toml())
        rows.append((name, point, found))
    for seed in seeds:
        for name, _, found in rows:
            _finetuned(setup, out, name, recipes[name], seed)
            _finetuned(setup, out, *_searched(rows, found), seed)
    table = [_row(setup, out, rows, name, point, found, seeds, everything.dense.totals["energy"]) for name, point, found in rows]
    result = {"about": setup.about, "seeds": list(seeds), "dense_top1_dev": damage.dense.top1, "rows": table, "conditions": conditions(setup.device)}
    write_json(out / "table.json", result)
    print(markdown(table), flush=True)
    return result


def markdown(table: list[dict[str, Any]]) -> str:
    """The comparison as a table for people."""
    lines = [
        "| at the energy of | of dense | row, top-1 % | searched, top-1 % | searched − row, points | sum of KL, row / searched |",
        "|---|---|---|---|---|---|",
    ]
    for row in table:
        low, high = row["interval95"]
        lines.append(
            f"| {row['row']} | {row['energy_of_dense']:.3f} / {row['searched_energy_of_dense']:.3f} | {row['top1']:.2f} | {row['searched_top1']:.2f} | "
            f"{row['difference']:+.2f} ({low:+.2f} … {high:+.2f}) | {row['kl']:.4f} / {row['searched_kl']:.4f} |"
        )
    return "\n".join(lines)


def _damage(setup: Setup, dense: nn.Module, options: Any, path: Path) -> Sensitivity:
    if path.exists():
        found = Sensitivity.from_json(read_json(path), str(path))
        identity(dense).check(found.identity, str(path))
        return found
    found = sensitivity(
        dense, setup.dev, primitives=changes(options), together=False, settings=setup.settings, device=setup.device, amp_dtype=setup.amp_dtype,
        step=lambda text: print("sensitivity:", text, flush=True),
    )  # fmt: skip
    write_json(path, stamped("sensitivity", {"model": asdict(architecture_of(dense)), "split": "dev", "note": setup.about, **found.to_json()}))
    return found


def _searched(rows: list, found: Any) -> tuple[str, Recipe]:
    """File name and recipe; the first of equal choices stands for all, so that it is trained once."""
    return next((f"at-{name}", other.recipe) for name, _, other in rows if other.point.choice == found.point.choice)


def _finetuned(setup: Setup, out: Path, name: str, recipe: Recipe, seed: int) -> dict[str, Any]:
    path = out / f"{name}-s{seed}.json"
    if path.exists():
        kept = read_json(path)
        if kept["recipe"] != json.loads(json.dumps(recipe.to_dict())):
            raise UserError(f"{path} is of another recipe than the one to compare: give another folder")
        return kept
    torch.manual_seed(seed)
    model = setup.dense().to(setup.device)
    # A recipe that changes nothing is the control: the dense model, trained for as long.
    if recipe.overrides or name in recipes:
        reparameterize(model, replace(recipe, **_made(setup.settings)))
    config = setup.config(seed)
    if not hasattr(model, "shiftaddvit_recipe"):
        epochs = sum(stage.epochs for stage in config.stages)
        config = replace(config, stages=(replace(config.stages[-1], primitives="dense", epochs=epochs),))
    found = finetune(model, setup.train(seed), setup.test(), config, show=False).evaluation
    images = next(iter(setup.test()))[0][:256]
    energy = model_energy(model, images, image_size=setup.image_size)
    result = {
        "recipe": recipe.to_dict(), "seed": seed, "evaluation": found.to_json(), "energy_mj": energy.total_mj,
        "shift_share": energy.settings["shift_share"], "images": setup.about,
    }  # fmt: skip
    write_json(path, result)
    print(f"{name} seed {seed}: top-1 {found.top1:.2f} %, {energy.total_mj:.4f} mJ with the routing as trained", flush=True)
    return result


def _made(settings: Recipe) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in ("shift", "binary", "hash", "angular", "moe", "last_stage_softmax")}


def _row(setup: Setup, out: Path, rows: list, name: str, point: Any, found: Any, seeds: tuple[int, ...], dense: float) -> dict[str, Any]:
    results = [(_finetuned(setup, out, name, recipes[name], s), _finetuned(setup, out, *_searched(rows, found), s)) for s in seeds]
    pairs = [tuple(Evaluation.from_json(result["evaluation"]) for result in pair) for pair in results]
    paired = [compare(searched, fixed) for fixed, searched in pairs]
    # Images are shared by the seeds, so the interval of the mean is not divided by √seeds.
    return {
        "row": name, "searched": _searched(rows, found)[0], "energy_of_dense": point.totals["energy"] / dense,
        "searched_energy_of_dense": found.point.totals["energy"] / dense, "kl": point.totals["kl"], "searched_kl": found.point.totals["kl"],
        "top1": mean([fixed.top1 for fixed, _ in pairs]), "searched_top1": mean([searched.top1 for _, searched in pairs]),
        "loss": mean([fixed.loss for fixed, _ in pairs]), "searched_loss": mean([searched.loss for _, searched in pairs]),
        "difference": mean([p.difference for p in paired]), "interval95": [mean([p.interval95[side] for p in paired]) for side in (0, 1)],
        "energy_mj": mean([fixed["energy_mj"] for fixed, _ in results]), "searched_energy_mj": mean([s["energy_mj"] for _, s in results]),
    }  # fmt: skip
