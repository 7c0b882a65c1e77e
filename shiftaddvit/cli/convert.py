"""`shiftaddvit convert`: a dense model in, a converted (or packed) one out, untrained."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shiftaddvit.errors import UserError

from . import options
from .energy import parse_size
from .failures import refuse_existing, told_when_disk_is_full
from .model_choice import ModelChoice, Say, card_line, counted, open_model, origin, settings_to_store

if TYPE_CHECKING:
    from torch import nn

    from shiftaddvit.model_card import ModelFacts


NO_IMAGES = "the recipe's hash functions learn from images: give --calibrate DATA, or use finetune, which does it by itself"


def convert(
    model: options.Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="The .safetensors file to write.")],
    recipe: options.RecipeName = None,
    weights: options.Weights = None,
    pretrained: options.Pretrained = False,
    num_classes: options.Classes = None,
    model_arg: options.ModelArgs = None,
    image_size: options.ImageSize = None,
    calibrate: Annotated[str | None, typer.Option(help="Data whose training images teach the hash functions, for recipes that hash.")] = None,
    packed: Annotated[bool, typer.Option("--packed", help="Store shift weights as 4- or 5-bit codes: same logits, no more training.")] = False,
    half: Annotated[bool, typer.Option("--half", help="Round all other weights to float16 values, which halves their size.")] = False,
    seed: Annotated[int, typer.Option(help="Of everything that starts at random.")] = 0,
    overwrite: options.Overwrite = False,
    verbose: options.Verbose = False,
) -> None:
    """Put shifts and adds into a pre-trained model (no training), or pack a trained one."""
    if output.suffix != ".safetensors":
        raise UserError(f"--output must end in .safetensors, got {str(output)!r}")
    refuse_existing(output, overwrite)
    size = parse_size(image_size)
    size = (size, size) if isinstance(size, int) else size
    choice = ModelChoice(model, options.model_args(model_arg), weights, pretrained, num_classes, size, seed)
    check_recipe(recipe)
    if calibrate is None and recipe is not None and hashes(recipe):
        raise UserError(NO_IMAGES)

    from shiftaddvit.reparam.calibrate import needs_calibration
    from shiftaddvit.serialization import round_dense, save

    from .image_choice import image_form

    network = open_model(choice, typer.echo, verbose)
    base = origin(choice, network)
    if recipe is None and not hasattr(network, "shiftaddvit_recipe"):
        raise UserError(f"{model} is dense: say what it becomes with --recipe (see 'shiftaddvit recipes'; dense leaves it as it is)")
    apply_recipe(network, recipe, typer.echo, verbose)
    form = image_form(network, size, None, choice.stored())
    if needs_calibration(network):
        calibrate_on(network, calibrate, form, seed, typer.echo)
    if half:
        round_dense(network)
    metadata = settings_to_store(form.size, form.crop_pct, choice.class_names(network))
    with told_when_disk_is_full(output):
        report = save(network, output, packed=packed, metadata=metadata, facts=_facts(choice, recipe, half, base))
    typer.echo(f"written: {report}")
    typer.echo(card_line(report))
    if recipe not in (None, "dense"):
        typer.echo(f"it was not trained yet; next: shiftaddvit finetune {model if choice.is_file else output} DATA "
                   f"{'--recipe ' + str(recipe) + ' ' if choice.is_file else ''}--output RUN")  # fmt: skip


def _facts(choice: ModelChoice, recipe: str | None, half: bool, base: dict[str, str]) -> "ModelFacts":
    """What is known of a model goes on to its packed copy. A conversion or rounding makes another model, whose accuracy nobody measured."""
    from shiftaddvit.model_card import ModelFacts
    from shiftaddvit.serialization import read_metadata

    if not choice.is_file:
        return ModelFacts(**base)
    before = ModelFacts.from_metadata(read_metadata(choice.model))
    if recipe not in (None, "dense"):
        return ModelFacts(**base)
    return replace(before, evaluation={}, training=f"{before.training}; then rounded to float16 values" if before.training else "") if half else before


def check_recipe(recipe: str | None) -> None:
    """Raise UserError for a recipe that does not exist, before anything is loaded."""
    from shiftaddvit.reparam.recipe import as_recipe

    if recipe not in (None, "dense"):
        as_recipe(recipe)


def hashes(recipe: str) -> bool:
    """Whether a recipe learns hash functions in all of a model's attention; with overrides only the model tells."""
    from shiftaddvit.reparam.recipe import as_recipe

    if recipe == "dense":
        return False
    found = as_recipe(recipe)
    return not found.overrides and (found.add == "ksh" or found.attention == "ecoformer")


def apply_recipe(network: "nn.Module", recipe: str | None, say: Say, verbose: bool = False) -> None:
    """Convert in place and say what became of the parts; None and `dense` leave the model as it is."""
    from shiftaddvit.reparam import reparameterize

    if recipe in (None, "dense"):
        return
    report = reparameterize(network, recipe).shiftaddvit_report
    if verbose:
        say(f"converted by {recipe}\n{report}")
        return
    say(f"converted by {recipe}: {len(report.used)} parts keep their values")
    if report.made:
        say(f"  new: {counted(report.made)}")
    if report.dropped:
        say(f"  dropped: {counted(report.dropped)}")
    if report.left:
        say(f"  linear layers that go on multiplying: {counted(report.left)}")


def calibrate_on(network: "nn.Module", data: str | None, form: object, seed: int, say: Say) -> None:
    """Train the hash functions on eight training images of `data`."""
    from shiftaddvit.reparam import calibrate

    from .image_choice import DataChoice, some_images

    if data is None:
        raise UserError(NO_IMAGES)
    images = some_images(DataChoice(data).open("train"), form, 8, seed)
    if len(images) == 0:
        raise UserError(f"none of the images of {data} drawn for calibration can be read")
    say(f"calibrated {calibrate(network, images, seed)} hash functions on {len(images)} images of {data}")
