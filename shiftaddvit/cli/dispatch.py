"""`shiftaddvit dispatch`: which image regions go to the multiplication expert and which to the shift expert, as a file that `report` draws."""

from pathlib import Path
from typing import Annotated

import typer

from shiftaddvit.errors import UserError

from . import options
from .failures import refuse_existing


def dispatch(
    file: Annotated[Path, typer.Argument(help="A .safetensors file that shiftaddvit wrote, of a model with mixtures of experts.")],
    images: Annotated[Path, typer.Argument(help="Folder of pictures; a picture's folder, if it names a class of the model, is its label.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The .json file to write; 'shiftaddvit report' reads it.")] = Path("dispatch.json"),
    count: Annotated[
        int, typer.Option("--images", help="Run the model on so many pictures, spread over the folder; the shares are over all of them.")
    ] = 64,
    show: Annotated[int, typer.Option(help="Keep the maps of so many of them, with small copies of the pictures.")] = 8,
    image_size: options.ImageSize = None,
    crop_pct: options.CropPct = None,
    overwrite: options.Overwrite = False,
) -> None:
    """Run a model once and record the expert of every token, layer by layer."""
    from .energy import parse_size

    if output.suffix != ".json":
        raise UserError(f"--output must end in .json, got {str(output)!r}")
    refuse_existing(output, overwrite)
    if count < 1 or show < 0:
        raise UserError(f"--images must be 1 or more and --show 0 or more, got {count} and {show}")
    size = parse_size(image_size)

    import torch

    from shiftaddvit.conditions import conditions
    from shiftaddvit.evaluation.dispatch import dispatch as run
    from shiftaddvit.files import write_json
    from shiftaddvit.schema import stamped

    from .evaluate import model_facts
    from .image_choice import as_input, as_picture, image_files, image_form, spread
    from .model_choice import ModelChoice, check_saved, open_model

    check_saved(str(file))
    facts = model_facts(str(file))
    choice = ModelChoice(str(file), image_size=size)
    network = open_model(choice, lambda text: typer.echo(text, err=True))
    form = image_form(network, size, crop_pct, choice.stored())
    classes = choice.stored().get("classes")
    files = spread(image_files(images, None, "IMAGES"), count)
    inputs = torch.stack([as_input(path, form) for path in files])
    shown = spread(files, show) if show else []
    order = [files.index(path) for path in shown] + [number for number, path in enumerate(files) if path not in shown]
    pictures = torch.stack([as_picture(inputs[number], form) for number in order[: len(shown)]]) if shown else torch.empty(0)
    labels = [path.parent.name if path.parent.name in (classes or ()) else None for path in shown]
    found = run(network, inputs[order], pictures, [path.name for path in shown], labels, classes)
    described = {**facts, "file": str(file), "data": str(images)}
    write_json(output, stamped("dispatch", described | found.to_json() | {"conditions": conditions("cpu", image_size=list(form.size))}))
    typer.echo(
        f"{len(found.layers)} mixtures, {found.images} images: {100 * found.shift_share:.1f} % of the tokens go to a shift expert\n"
        f"written: {output}\n"
        f"next: shiftaddvit report {output}"
    )
