"""`shiftaddvit energy`: millijoules of a model on an analytical model of the Eyeriss accelerator."""

import json
import re
import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shiftaddvit.errors import UserError

from .failures import refuse_existing

if TYPE_CHECKING:
    from shiftaddvit.cost import Energy, Settings


class Mode(str, Enum):
    """Which energy model."""

    paper = "paper"
    eyeriss = "eyeriss"


class Coverage(str, Enum):
    """Which operations are counted."""

    released = "released"
    full = "full"


class Fusion(str, Enum):
    """What happens on the way between layers."""

    rows = "rows"
    none = "none"


class Over(str, Enum):
    """What a sweep varies."""

    shift_share = "shift-share"
    weight_bits = "weight-bits"
    shift_bits = "shift-bits"
    activation_bits = "activation-bits"


def energy(
    model: Annotated[str, typer.Argument(help="Any timm model, pvt_tiny, nerf, gnt, or a .safetensors file that shiftaddvit saved; 'units' shows the unit costs of the primitives.")],
    recipe: Annotated[str, typer.Option(help="Recipe name or TOML file; dense leaves the model as it is.")] = "dense",
    mode: Annotated[Mode, typer.Option(help="eyeriss: least energy, everything counted. paper: the published model with its quirks.")] = Mode.eyeriss,
    coverage: Annotated[Coverage, typer.Option(help="released: what hooks on leaf modules see. full: products between layers too.")] = Coverage.full,
    shift_share: Annotated[float | None, typer.Option(help="Share of a mixture's tokens for its shift expert, 0 to 1; 0.5 is assumed without it.")] = None,
    add_index_bug: Annotated[bool | None, typer.Option("--add-index-bug/--no-add-index-bug", help="Mode paper: every Add costs what the first Add costs. (default: on)")] = None,
    stage4_matmuls: Annotated[bool | None, typer.Option("--stage4-matmuls/--no-stage4-matmuls", help="Count the attention products of a pyramid's last stage. (default: as coverage says)")] = None,
    image_size: Annotated[str | None, typer.Option(help="Pixels of a side, or HEIGHTxWIDTH. (default: the model's own)")] = None,
    batch: Annotated[int, typer.Option(help="Images in the batch; energies are of the whole batch.")] = 1,
    units: Annotated[str, typer.Option(help="Unit energies in mode eyeriss: 45nm, 45nm-float, 65nm, eyeriss-normalised, or a TOML file.")] = "45nm",
    fusion: Annotated[Fusion, typer.Option(help="Mode eyeriss. rows: norms, softmax, routers happen as rows pass through the buffer. none: each reads and writes DRAM.")] = Fusion.rows,
    activation_bits: Annotated[int, typer.Option(help="Mode eyeriss: bits of an activation.")] = 16,
    weight_bits: Annotated[int, typer.Option(help="Mode eyeriss: bits of a multiplication's weight.")] = 16,
    shift_bits: Annotated[int | None, typer.Option(help="Mode eyeriss: bits of a shift weight. (default: what each layer has, 5 or 4)")] = None,
    word_bits: Annotated[int, typer.Option(help="Mode paper: bits of every operand but a shift's, 32 or 8.")] = 32,
    exclude: Annotated[list[str] | None, typer.Option(help="Leave out modules whose name matches this glob; may be repeated.")] = None,
    images: Annotated[Path | None, typer.Option(help="Folder of images to measure the routing of a saved model on.")] = None,
    max_images: Annotated[int, typer.Option(min=1, help="Measure on the first so many images of the folder.")] = 64,
    compare: Annotated[str | None, typer.Option(help="Recipes to set side by side, separated by commas; msa, pvt and ecoformer are always there.")] = None,
    baseline: Annotated[str | None, typer.Option(help="With --compare: recipe that savings refer to. (default: msa)")] = None,
    sweep: Annotated[Over | None, typer.Option(help="Vary one setting.")] = None,
    values: Annotated[str | None, typer.Option(help="With --sweep: its values, separated by commas.")] = None,
    layers: Annotated[bool, typer.Option("--layers", help="Show every operation with its tiling.")] = False,
    figure: Annotated[Path | None, typer.Option(help="Write a stacked bar (or the sweep's curve) as .svg and .png.")] = None,
    as_json: Annotated[str | None, typer.Option("--json", help="Write everything as JSON to a file, or to the output for '-'.")] = None,
) -> None:  # fmt: skip
    """Energy of one forward: by layer and level, compared between recipes, or over a range of a setting."""
    from shiftaddvit.cost import BitWidths, Settings, load_units
    from shiftaddvit.cost.figures import check_figure_path

    if model == "units":
        _show_units(as_json)
        return
    if add_index_bug and mode is not Mode.paper:
        raise UserError("--add-index-bug belongs to --mode paper")
    if sum((compare is not None, sweep is not None, images is not None)) > 1:
        raise UserError("--compare, --sweep and --images exclude one another: give one")
    if images is not None and shift_share is not None:
        raise UserError("--images measures the shift share: leave out --shift-share")
    if baseline is not None and compare is None:
        raise UserError("--baseline belongs to --compare: name the recipes to set beside it")
    if values is not None and sweep is None:
        raise UserError("--values belongs to --sweep: say what to vary")
    if layers and (compare is not None or sweep is not None):
        raise UserError("--layers shows one recipe: leave out --compare and --sweep")
    if figure is not None:
        check_figure_path(figure)
    if as_json not in (None, "-"):
        refuse_existing(Path(as_json), overwrite=True)
    settings = Settings(mode.value, coverage.value, add_index_bug is not False, stage4_matmuls, word_bits,
                        BitWidths(activation_bits, weight_bits, shift_bits), load_units(units), fusion.value, tuple(exclude or ()))  # fmt: skip
    size = parse_size(image_size)
    if model.endswith(".safetensors"):
        if compare is not None or sweep is not None or recipe != "dense":
            raise UserError("a saved model has its recipe: leave out --recipe, --compare and --sweep")
        found = _saved(Path(model), images, max_images, settings, shift_share, size, batch)
        _present_one(found, _of_file(model), layers, figure, as_json)
        return
    if images is not None:
        raise UserError("--images needs weights: give a .safetensors file that shiftaddvit saved as MODEL")
    _named(model, recipe, settings, shift_share, size, batch, compare, baseline or "msa", sweep, values, layers, figure, as_json)


def _named(model: str, recipe: str, settings: "Settings", shift_share: float | None, size: tuple[int, int] | None, batch: int,
           compare: str | None, baseline: str, over: Over | None, values: str | None, layers: bool, figure: Path | None,
           as_json: str | None) -> None:  # fmt: skip
    from shiftaddvit.cost import compare as compare_recipes
    from shiftaddvit.cost import sweep as sweep_setting
    from shiftaddvit.cost.estimate import named_energy
    from shiftaddvit.cost.figures import bar_figure, curve_figure
    from shiftaddvit.cost.tables import comparison_view, sweep_view

    if compare is not None:
        names = [name.strip() for name in compare.split(",") if name.strip()]
        names += [recipe] if recipe != "dense" else []
        found = compare_recipes(model, names, baseline, settings, shift_share, size, batch)
        drawn = bar_figure(found.energies, figure) if figure else []
        _present(comparison_view(found), "energy-compare", {"subject": {"model": {"name": model, "args": {}}}} | found.to_dict(), drawn, as_json)
    elif over is not None:
        curve = sweep_setting(model, recipe, over.value, _values(values), settings, shift_share, size, batch)
        drawn = curve_figure(curve, figure) if figure else []
        _present(sweep_view(curve), "energy-sweep", curve.to_dict(), drawn, as_json)
    else:
        subject = {"model": {"name": model, "args": {}}, "recipe": recipe}
        _present_one(named_energy(model, recipe, settings, shift_share, size, batch), subject, layers, figure, as_json)


def _of_file(path: str) -> dict[str, Any]:
    """What a saved model is, as result files say it."""
    from .evaluate import model_facts

    facts = model_facts(path)
    return {"model": facts["model"], "recipe": (facts["recipe"] or {}).get("name") or ("dense" if facts["recipe"] is None else Path(path).stem), "file": path}


def _present_one(found: "Energy", subject: dict[str, Any], layers: bool, figure: Path | None, as_json: str | None) -> None:
    from shiftaddvit.cost.figures import bar_figure
    from shiftaddvit.cost.tables import energy_view

    drawn = bar_figure({found.model.rpartition(", ")[2]: found}, figure) if figure else []
    _present(energy_view(found, layers), "energy", {"subject": subject} | found.to_dict(), drawn, as_json)


def _present(view: object, kind: str | None, value: dict[str, Any], drawn: list[Path], as_json: str | None) -> None:
    """Tables for people, unless the output is JSON; a result of some kind is stamped."""
    from rich.console import Console

    from shiftaddvit.conditions import conditions
    from shiftaddvit.files import write_json
    from shiftaddvit.schema import stamped

    if kind is not None:
        value = stamped(kind, value | {"conditions": conditions("cpu")})
    if as_json == "-":
        json.dump(value, sys.stdout, indent=1, allow_nan=False)
        sys.stdout.write("\n")
        return
    console = Console(width=None if sys.stdout.isatty() else 240)
    console.print(view)
    if as_json is not None:
        write_json(as_json, value)
        console.print(f"written: {as_json}", soft_wrap=True)
    for path in drawn:
        console.print(f"written: {path}", soft_wrap=True)


def _show_units(as_json: str | None) -> None:
    from dataclasses import asdict

    from shiftaddvit.cost.primitives import sources, unit_costs
    from shiftaddvit.cost.tables import primitive_view

    _present(primitive_view(), None, {"primitives": [asdict(cost) for cost in unit_costs()], "sources": sources()}, [], as_json)


def _saved(path: Path, folder: Path | None, limit: int, settings: "Settings", shift_share: float | None,
           size: tuple[int, int] | None, batch: int) -> "Energy":  # fmt: skip
    from shiftaddvit.cost.estimate import model_energy
    from shiftaddvit.serialization import load, read_image_settings

    from .image_choice import as_input, image_files, image_form

    network = load(path)
    form = image_form(network, size, None, read_image_settings(path))
    images = [as_input(file, form).unsqueeze(0) for file in image_files(folder, limit, "--images")] if folder is not None else None
    return model_energy(network, images, settings, shift_share, form.size, batch)


def parse_size(text: str | None) -> tuple[int, int] | None:
    """`224` or `378x504`."""
    if text is None:
        return None
    if not (match := re.fullmatch(r"(\d{1,6})(?:x(\d{1,6}))?", text)):
        raise UserError(f"--image-size must be a number of pixels or HEIGHTxWIDTH, as in 224 or 160x224, got {text!r}")
    return int(match[1]), int(match[2] or match[1])


def _values(text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--values must be numbers separated by commas, got {text!r}") from None
