"""`shiftaddvit search`: which primitive goes where, under a budget."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shiftaddvit.errors import UserError
from shiftaddvit.processes import this_process

from . import options
from .energy import parse_size
from .evaluate import autocast_type
from .failures import refuse_existing, told_when_memory_ends

if TYPE_CHECKING:
    from shiftaddvit.autorecipe import Found

RECIPE, RESULT, SENSITIVITY, LATENCY, FIGURE = "recipe.toml", "search.json", "sensitivity.json", "latency.json", "front.svg"
"""What a search writes into its folder."""
NOT_MET = 3
"""Exit code when the budgets cannot be met; the nearest point is written all the same."""


def search(
    model: options.Model,
    data: Annotated[str | None, typer.Argument(help="Images for the search, as for sensitivity; may be left out with --sensitivity.")] = None,
    budget: Annotated[list[str] | None, typer.Option(help="energy=0.6 (of dense) or 0.5mJ; latency=0.8 or 300us; drop=1 (points); kl=0.01; may be repeated.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for recipe.toml, search.json, the tables and front.svg.")] = Path("runs/search"),
    minimise: Annotated[str | None, typer.Option(help="kl, loss, drop, energy or latency. (default: kl, or energy where only the damage has a budget)")] = None,
    sensitivity: Annotated[Path | None, typer.Option(help="Sensitivities measured before (sensitivity.json of another search).")] = None,
    latency: Annotated[Path | None, typer.Option(help="Latencies measured before, perhaps on another device (latency.json of another search).")] = None,
    primitive: Annotated[list[str] | None, typer.Option(help="What may be chosen: msa, linear, add, hash, attn-shift, attn-moe, mlp-shift, mlp-moe; may be repeated. (default: all but hash)")] = None,
    like: Annotated[str | None, typer.Option(help="Make shifts, codes and mixtures as this recipe does (name or TOML file).")] = None,
    shift_share: Annotated[float, typer.Option(help="Share of a mixture's tokens that is taken to go to its shift expert.")] = 0.5,
    units: Annotated[str, typer.Option(help="Unit energies: 45nm, 45nm-float, 65nm, eyeriss-normalised, or a TOML file.")] = "45nm",
    activation_bits: Annotated[int, typer.Option(help="Bits of an activation, for energy.")] = 16,
    fusion: Annotated[str, typer.Option(help="rows: what works on rows happens in the buffer. none: each function is a layer of its own.")] = "rows",
    latency_batch: Annotated[int, typer.Option(help="Images at once, for latency.")] = 1,
    points: Annotated[int, typer.Option(help="Points of the front; 0 for all there are.")] = 40,
    figure: Annotated[bool, typer.Option("--figure/--no-figure", help="Draw the front.")] = True,
    weights: options.Weights = None,
    pretrained: options.Pretrained = False,
    num_classes: options.Classes = None,
    model_arg: options.ModelArgs = None,
    images: Annotated[int, typer.Option(help="Measure on so many images, drawn at random; they are kept in memory.")] = 1000,
    split: Annotated[str, typer.Option(help="train, val or test: never the one that the final accuracy is measured on.")] = "train",
    batch_size: options.BatchSize = 128,
    image_size: options.ImageSize = None,
    crop_pct: options.CropPct = None,
    workers: options.Workers = None,
    precision: options.Precision = "no",
    seed: Annotated[int, typer.Option(help="Of the draw of images.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print search.json instead of tables.")] = False,
    strict: options.Strict = False,
    ignore_class_names: options.IgnoreNames = False,
    data_root: options.DataRoot = None,
    download: options.Download = False,
    overwrite: options.Overwrite = False,
) -> None:  # fmt: skip
    """Find the recipe that harms a model least under a budget, layer by layer, and show every trade-off there is. Exit code 3: the budgets
    cannot be met; what is written is the nearest point."""
    for name in (RECIPE, RESULT, SENSITIVITY, LATENCY, FIGURE):
        refuse_existing(output / name, overwrite)
    amp_dtype = autocast_type(precision)
    size = parse_size(image_size)
    size = (size, size) if isinstance(size, int) else size
    if data is None and sensitivity is None:
        raise UserError("search needs DATA to measure sensitivities on, or --sensitivity FILE with those measured before")
    if points < 0:
        raise UserError(f"--points must be at least 0, got {points}")
    if not 0 <= shift_share <= 1:
        raise UserError(f"--shift-share must be from 0 to 1, got {shift_share:g}")

    from shiftaddvit.autorecipe import Budget, CostTable
    from shiftaddvit.autorecipe import search as run
    from shiftaddvit.autorecipe.costs import read_json
    from shiftaddvit.autorecipe.figure import pyplot
    from shiftaddvit.autorecipe.optimise import scipy_optimize
    from shiftaddvit.autorecipe.options import SEARCHED
    from shiftaddvit.cost import BitWidths, Settings, load_units
    from shiftaddvit.evaluation.sensitivity import Sensitivity
    from shiftaddvit.reparam.recipe import as_recipe
    from shiftaddvit.schema import stamped
    from shiftaddvit.search_terms import PRIMITIVES

    from .image_choice import DataChoice, evaluation_loader, image_form, sample, some_images
    from .model_choice import ModelChoice, open_model

    # Everything that can be wrong with the words is found before a model is opened.
    budgets = [Budget.parse(text) for text in budget or ()]
    chosen = tuple(primitive or SEARCHED)
    for name in chosen:
        options.one_of("--primitive", name, tuple(PRIMITIVES))
    scipy_optimize()
    if figure:
        pyplot()
    damages = Sensitivity.from_json(read_json(sensitivity), str(sensitivity)) if sensitivity else None
    latencies = CostTable.from_json(read_json(latency), str(latency), "latency") if latency else None
    settings = as_recipe(like) if like else None
    energy = Settings(bits=BitWidths(activation_bits), units=load_units(units), fusion=options.one_of("--fusion", fusion, ("rows", "none")))

    choice = ModelChoice(model, options.model_args(model_arg), weights, pretrained, num_classes, size, seed)
    network = open_model(choice, lambda text: typer.echo(text, err=True))
    state = this_process()
    if state.num_processes > 1:
        raise UserError("search runs in one process: start it without torchrun")
    form = image_form(network, size, crop_pct, choice.stored())
    batches, teaching = None, None
    if data is not None:
        from shiftaddvit.data.sources import check_class_names, check_classes

        source = DataChoice(data, strict, data_root, download)
        drawn = sample(source.open(split), images, seed)
        check_classes(drawn, network.num_classes)
        check_class_names(drawn, choice.stored().get("classes"), model, ignore_class_names)
        # The model is evaluated once for each option: the images are decoded only once.
        batches = list(evaluation_loader(drawn, form, batch_size, workers, "cpu"))
        teaching = some_images(source.open("train"), form, 8, seed).to(state.device) if "hash" in chosen else None
    with told_when_memory_ends(batch_size):
        found = run(
            network.to(state.device), batches, budgets, primitives=chosen, settings=settings, damages=damages, latencies=latencies, energy=energy,
            shift_share=shift_share, minimise=minimise, image_size=form.size, batch=latency_batch, points=points or None,
            calibration_images=teaching, device=state.device, amp_dtype=amp_dtype, step=lambda text: typer.echo(f"search: {text}", err=True),
        )  # fmt: skip
    built = network.shiftaddvit_architecture
    about = {"model": {"name": built.name, "args": dict(built.args)}, "file": model if choice.is_file else None, "data": data}
    about |= {"split": split, "images": images, "seed": seed} if data is not None else {}
    measured = read_json(sensitivity) if sensitivity else stamped("sensitivity", about | found.sensitivity.to_json())
    result = stamped("search", about | found.to_json())
    written = _write(found, output, result, measured, figure)
    _show(found, written, result, as_json, model, output)
    if not found.met:
        typer.echo(f"the budgets cannot be met: {output / RECIPE} is the nearest point, over the budget", err=True)
        raise typer.Exit(NOT_MET)


def _write(found: "Found", output: Path, result: dict[str, Any], measured: dict[str, Any], figure: bool) -> list[Path]:
    from shiftaddvit.autorecipe.figure import front_figure
    from shiftaddvit.files import atomic_write, write_json
    from shiftaddvit.schema import stamped

    with atomic_write(output / RECIPE) as temporary:
        temporary.write_text(found.recipe.to_toml())
    write_json(output / RESULT, result)
    write_json(output / SENSITIVITY, measured)
    written = [output / RECIPE, output / RESULT, output / SENSITIVITY]
    for table in found.costs:
        if table.quantity == "latency":
            write_json(output / LATENCY, stamped("search-latency", table.to_json()))
            written.append(output / LATENCY)
    return written + (front_figure(found, output / FIGURE) if figure else [])


def _show(found: "Found", written: list[Path], result: dict[str, Any], as_json: bool, model: str, output: Path) -> None:
    import json

    from rich.console import Console

    if as_json:
        sys.stdout.write(json.dumps(result, indent=1, allow_nan=False) + "\n")
        return
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    console.print(found.view())
    typer.echo(f"written: {', '.join(map(str, written))}")
    if result["data"] is not None and result["split"] != "train":
        typer.echo(f"the search has looked at the {result['split']} images: the accuracy to report must come from others")
    if not found.met:
        return
    if found.recipe.overrides:
        typer.echo(f"next: shiftaddvit finetune {model} DATA --recipe {output / RECIPE} --output RUN")
    else:
        typer.echo("the dense network as it is does least harm within the budget: no recipe makes it better by these tables")
