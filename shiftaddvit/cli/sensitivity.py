"""`shiftaddvit sensitivity`: which layers can take which primitive, at what cost in accuracy."""

import sys
from typing import Annotated

import typer

from shiftaddvit.errors import UserError
from shiftaddvit.processes import this_process

from . import options
from .energy import parse_size
from .evaluate import autocast_type, json_path, write_result
from .failures import refuse_existing, told_when_memory_ends


def sensitivity(
    model: options.Model,
    data: options.Data,
    weights: options.Weights = None,
    pretrained: options.Pretrained = False,
    num_classes: options.Classes = None,
    model_arg: options.ModelArgs = None,
    primitive: Annotated[list[str] | None, typer.Option(help="msa, linear, add, hash, attn-shift, attn-moe, mlp-shift or mlp-moe, or two of one attention (add+attn-shift); may be repeated. (default: linear, add, attn-shift, mlp-shift)")] = None,
    together: Annotated[bool, typer.Option("--together", help="Only all layers of a kind at once, not one by one.")] = False,
    images: Annotated[int, typer.Option(help="Evaluate on so many images, drawn at random; they are kept in memory.")] = 1000,
    split: Annotated[str, typer.Option(help="train, val or test.")] = "val",
    batch_size: options.BatchSize = 128,
    image_size: options.ImageSize = None,
    crop_pct: options.CropPct = None,
    workers: options.Workers = None,
    precision: options.Precision = "no",
    seed: Annotated[int, typer.Option(help="Of the draw of images and of the hash functions.")] = 0,
    as_json: options.JsonFile = None,
    strict: options.Strict = False,
    ignore_class_names: options.IgnoreNames = False,
    data_root: options.DataRoot = None,
    download: options.Download = False,
    overwrite: options.Overwrite = False,
) -> None:
    """Convert one layer at a time of a dense model, without training, and measure the accuracy."""
    refuse_existing(json_path(as_json), overwrite)
    amp_dtype = autocast_type(precision)
    size = parse_size(image_size)
    size = (size, size) if isinstance(size, int) else size

    from rich.console import Console

    from shiftaddvit.conditions import conditions
    from shiftaddvit.data.sources import check_class_names, check_classes
    from shiftaddvit.evaluation.sensitivity import USUAL
    from shiftaddvit.evaluation.sensitivity import sensitivity as run
    from shiftaddvit.schema import stamped
    from shiftaddvit.search_terms import change_of

    from .image_choice import DataChoice, evaluation_loader, image_form, sample, some_images
    from .model_choice import ModelChoice, open_model

    chosen = tuple(primitive or USUAL)
    hashes = any(change_of(name).get("add") == "ksh" for name in chosen)
    source = DataChoice(data, strict, data_root, download)
    drawn = sample(source.open(split), images, seed)
    choice = ModelChoice(model, options.model_args(model_arg), weights, pretrained, num_classes, size, seed)
    network = open_model(choice, lambda text: typer.echo(text, err=True))
    check_classes(drawn, network.num_classes)
    check_class_names(drawn, choice.stored().get("classes"), model, ignore_class_names)
    form = image_form(network, size, crop_pct, choice.stored())
    state = this_process()
    if state.num_processes > 1:
        raise UserError("sensitivity runs in one process: start it without torchrun")
    device = state.device
    # The model is evaluated once for each row: the images are decoded only once.
    batches = list(evaluation_loader(drawn, form, batch_size, workers, "cpu"))
    teaching = some_images(source.open("train"), form, 8, seed).to(device) if hashes else None
    with told_when_memory_ends(batch_size):
        found = run(
            network.to(device), batches, primitives=chosen, per_site=not together, calibration_images=teaching, device=device,
            amp_dtype=amp_dtype, step=lambda text: typer.echo(f"evaluating: {text}", err=True),
        )  # fmt: skip
    if as_json != "-":
        console = Console(width=None if sys.stdout.isatty() else 120)
        console.print(found.table())
        for where, name, reason in found.skipped:
            console.print(f"{where} cannot take {name}: {reason}", soft_wrap=True)
    built = network.shiftaddvit_architecture
    described = {"model": {"name": built.name, "args": dict(built.args)}, "file": model if choice.is_file else None, "data": data, "split": split}
    write_result(stamped("sensitivity", described | found.to_json() | {"conditions": conditions(device, seed=seed, images=len(drawn))}), as_json)
