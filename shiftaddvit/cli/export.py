"""`shiftaddvit export`: a model as a file for another runtime, or as integers for hardware."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shiftaddvit.errors import UserError

from . import options
from .energy import parse_size
from .failures import refuse_existing, refuse_unwritable, told_when_disk_is_full
from .model_choice import ModelChoice, open_model

if TYPE_CHECKING:
    from torch import Tensor

_FORMATS = {"torch": ".pt2", "onnx": ".onnx", "vectors": ""}
"""With the ending of their files; as in `portable`, which takes seconds to import."""


def export(
    model: options.Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="The .pt2 or .onnx file to write; a folder for vectors.")],
    format: Annotated[str, typer.Option(help="torch (a torch.export program), onnx, or vectors (integers for hardware, docs/hardware.md).")],
    images: Annotated[str | None, typer.Option(help="Data to run the file on, and for vectors to calibrate on; quickstart is the embedded one. (default: noise)")] = None,
    packed: Annotated[bool, typer.Option("--packed", help="Keep shift weights as 4- or 5-bit codes, decoded inside the program: a smaller file.")] = False,
    opset: Annotated[int | None, typer.Option(help="ONNX operator set. (default: what the installed torch recommends)")] = None,
    tolerance: Annotated[float, typer.Option(help="Largest difference of a logit, relative to the largest logit or one.")] = 1e-3,
    weights: options.Weights = None,
    pretrained: options.Pretrained = False,
    num_classes: options.Classes = None,
    model_arg: options.ModelArgs = None,
    image_size: options.ImageSize = None,
    crop_pct: options.CropPct = None,
    seed: Annotated[int, typer.Option(help="Of everything that starts at random.")] = 0,
    overwrite: options.Overwrite = False,
) -> None:  # fmt: skip
    """Write a model for another runtime, and run what was written before it counts."""
    options.one_of("--format", format, tuple(_FORMATS))
    if format == "vectors":
        _refuse_folder(output, overwrite)
        if images is None:
            raise UserError("--format vectors calibrates the ranges of activations on images: give --images DATA")
        refuse_unwritable(output / "file")
    else:
        if output.suffix != _FORMATS[format]:
            raise UserError(f"a file of format {format!r} must end in {_FORMATS[format]}, got {str(output)!r}")
        refuse_existing(output, overwrite)
        if opset is not None and format != "onnx":
            raise UserError("--opset is about --format onnx only")
    if tolerance <= 0:
        raise UserError(f"--tolerance must be above 0, got {tolerance:g}")
    size = parse_size(image_size)
    size = (size, size) if isinstance(size, int) else size
    choice = ModelChoice(model, options.model_args(model_arg), weights, pretrained, num_classes, size, seed)

    from shiftaddvit.portable import export as write

    from .image_choice import image_form

    network = open_model(choice, typer.echo)
    form = image_form(network, size, crop_pct, choice.stored())
    samples = _samples(images, form, seed, 64 if format == "vectors" else 8)
    settings = {
        "classes": choice.class_names(network), "image_size": list(form.size),
        "crop_pct": form.crop_pct, "mean": list(form.mean), "std": list(form.std),
    }  # fmt: skip
    typer.echo("tracing, writing and running what was written; large models take minutes")
    with told_when_disk_is_full(output):
        report = write(network, output, format, images=samples, packed=packed, opset=opset, tolerance=tolerance, metadata=settings)
    typer.echo(f"written: {report}")


def _samples(images: str | None, form: object, seed: int, count: int) -> "Tensor":
    from .image_choice import DataChoice, some_images

    if images is None:
        import torch

        return torch.randn(count, 3, *form.size, generator=torch.Generator().manual_seed(seed))
    if images == "quickstart":
        from shiftaddvit.quickstart.assets import load_images, test_loader

        embedded = load_images()
        chosen = slice(0, len(embedded.train_images), max(1, len(embedded.train_images) // count))
        return next(iter(test_loader(embedded.train_images[chosen][:count], embedded.train_labels[chosen][:count])))[0]
    found = some_images(DataChoice(images).open("train"), form, count, seed)
    if len(found) == 0:
        raise UserError(f"none of the images of {images} can be read")
    return found


def _refuse_folder(output: Path, overwrite: bool) -> None:
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output} is a file: give a folder for vectors")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise UserError(f"{output} already holds files: replace them (--overwrite) or choose another folder (--output)")
