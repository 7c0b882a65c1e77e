"""One training run from the command line: model, data, recipe and schedule put together."""

import json
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from shiftaddvit.errors import UserError
from shiftaddvit.processes import leave, this_process

from .convert import apply_recipe, check_recipe
from .evaluate import summary
from .failures import interrupt_only_here, told_when_disk_is_full, told_when_memory_ends
from .image_choice import DataChoice, ImageForm, augmentation, check_apart, image_form, training_loaders
from .model_choice import ModelChoice, Say, card_line, open_model, origin, settings_to_store

if TYPE_CHECKING:
    from torch import nn

    from shiftaddvit.data.images import ImageData
    from shiftaddvit.train import FinetuneConfig, FinetuneResult


@dataclass(frozen=True)
class Job:
    """What to train on what, and where the result goes."""

    choice: ModelChoice
    """The model."""
    data: DataChoice
    """Images; their train and val splits."""
    output: Path
    """The run's folder."""
    recipe: str | None = None
    """Name, TOML file, `dense`, or None for the model as it is."""
    val: str | None = None
    """Validation images elsewhere; `none` for no validation."""
    teacher: str | None = None
    """Saved dense model to distil from; None for the model before conversion."""
    batch_size: int = 64
    """For each process."""
    workers: int | None = None
    """Decoding processes; None for the default."""
    resident: str = "auto"
    """auto, yes or no."""
    augment: str = "default"
    """default, light or none."""
    crop_pct: float | None = None
    """Of evaluation; None for the model's own."""
    resume: bool = False
    """Go on with the run in the folder."""
    overwrite: bool = False
    """Replace it."""
    verbose: bool = False
    """Whole reports."""


def train(job: Job, config: "FinetuneConfig") -> None:
    """Run the job, say how it ended and what to do next."""
    from shiftaddvit.train.run_folder import CHECKPOINT, RUN

    if job.resume and job.overwrite:
        raise UserError("--resume and --overwrite exclude one another: give one")
    if job.output.exists() and not job.output.is_dir():
        raise UserError(f"{job.output} is a file; --output names the run's folder")
    if job.resume and not (job.output / RUN).exists():
        raise UserError(f"{job.output} holds no run to resume: start one without --resume")
    # Said here too, before model and data are opened.
    if (job.output / RUN).exists() and not (job.resume or job.overwrite):
        raise UserError(f"{job.output} already holds a run: resume it (--resume), replace it (--overwrite) or choose another folder")
    check_recipe(job.recipe)
    augment = augmentation(job.augment)
    state = this_process()
    say: Say = typer.echo if state.is_main_process else _silent
    if job.resume and not (job.output / CHECKPOINT).exists():
        say(f"{job.output} holds no checkpoint yet: the run starts from its beginning")
    train_data, val_data = _open(job)
    model = open_model(_with_classes(job.choice, train_data), say, job.verbose)
    if getattr(model, "shiftaddvit_packed", False):
        raise UserError(f"{job.choice.model} is packed and no longer trains: give the file it was packed from")
    base = origin(job.choice, model)
    teacher = _teacher(job, model, train_data, config.distill_weight)
    apply_recipe(model, job.recipe, say, job.verbose)
    form = image_form(model, job.choice.image_size, job.crop_pct, job.choice.stored())
    loaders = training_loaders(
        train_data, val_data or train_data, form, batch_size=job.batch_size, workers=job.workers, resident=job.resident, augment=augment,
        seed=config.seed, device=state.device,
    )  # fmt: skip
    where = f"{state.num_processes} × {state.device.type}" if state.num_processes > 1 else state.device.type
    said = "" if val_data is None else f", {len(val_data)} to validate"
    say(f"{len(train_data)} images of {train_data.num_classes} classes at {form.size[0]}×{form.size[1]}{said}; on {where}, batch {job.batch_size} each")
    result = _run(job, model, (loaders[0], loaders[1] if val_data is not None else None), config, teacher, _facts(job, form, train_data, val_data))
    if state.is_main_process and result.ended_before and _whole(job.output):
        typer.echo(f"the run in {job.output} had ended: nothing was changed")
        if result.evaluation is not None:
            typer.echo(summary(result.evaluation))
    elif state.is_main_process:
        _finish(job, model, result, settings_to_store(form.size, form.crop_pct, train_data.classes), base)
    leave(state)


def _run(job: Job, model: "nn.Module", loaders: tuple[Any, Any], config: "FinetuneConfig", teacher: "nn.Module | None",
         facts: dict[str, Any]) -> "FinetuneResult":  # fmt: skip
    from shiftaddvit.train import finetune

    with told_when_memory_ends(job.batch_size), told_when_disk_is_full(job.output), interrupt_only_here():
        return finetune(model, *loaders, config, output=job.output, resume=job.resume, overwrite=job.overwrite, teacher=teacher, data=facts)


def _facts(job: Job, form: ImageForm, train_data: "ImageData", val_data: "ImageData | None") -> dict[str, Any]:
    """What a run that is resumed must see again."""
    validation = None if val_data is None else val_data.identity()
    images = {"training images": train_data.identity(), "validation images": validation}
    return images | {"image size": list(form.size), "crop": form.crop_pct, "augmentation": job.augment}


def _whole(run: Path) -> bool:
    """Whether a run that ended has what is added to its files last, or was killed before that."""
    from shiftaddvit.serialization import read_image_settings
    from shiftaddvit.train.run_folder import MODEL, RESULT

    return bool(read_image_settings(run / MODEL)) and "data" in json.loads((run / RESULT).read_text())


def _open(job: Job) -> "tuple[ImageData, ImageData | None]":
    """Training and validation images; UserError where they would be the same."""
    from shiftaddvit.data.sources import NoSplit

    train_data = job.data.open("train")
    if job.val == "none":
        return train_data, None
    if job.val is not None:
        return train_data, DataChoice(job.val, job.data.strict, job.data.root, job.data.download).open("val")
    try:
        val_data = job.data.open("val")
    except NoSplit as error:
        raise UserError(f"{error}; give validation images with --val PATH, or --val none to go without") from None
    check_apart(train_data, val_data, job.data.data)
    return train_data, val_data


def _with_classes(choice: ModelChoice, data: "ImageData") -> ModelChoice:
    """As many outputs as the data have classes, unless the user said how many."""
    from shiftaddvit.data.sources import check_classes

    if choice.num_classes is None:
        return replace(choice, num_classes=data.num_classes)
    check_classes(data, choice.num_classes)
    return choice


def _teacher(job: Job, model: "nn.Module", data: "ImageData", weight: float) -> "nn.Module | None":
    from shiftaddvit.data.sources import check_class_names
    from shiftaddvit.serialization import load, read_image_settings

    if not weight:
        if job.teacher is not None:
            raise UserError("--teacher needs --distill, its share of the loss")
        return None
    if job.teacher is not None:
        teacher = load(job.teacher)
        if teacher.num_classes != model.num_classes:
            raise UserError(f"--teacher {job.teacher} has {teacher.num_classes} classes, the model {model.num_classes}")
        check_class_names(data, read_image_settings(job.teacher).get("classes"), job.teacher, others_allowed=True)
        return teacher
    if hasattr(model, "shiftaddvit_recipe"):
        raise UserError(f"--distill needs the dense model, and {job.choice.model} is converted: name the dense one with --teacher")
    if not (job.choice.is_file or job.choice.weights or job.choice.pretrained):
        raise UserError("--distill needs a trained teacher, and the model's weights are random: give --weights or --teacher")
    check_class_names(data, job.choice.stored().get("classes"), job.choice.model, others_allowed=True)
    return deepcopy(model)


def _finish(job: Job, model: "nn.Module", result: "FinetuneResult", metadata: dict[str, str], base: dict[str, str]) -> None:
    from shiftaddvit.model_card import ModelFacts
    from shiftaddvit.serialization import read_metadata, save
    from shiftaddvit.train.run_folder import MODEL, annotate_result

    written = job.output / MODEL
    # Once more, with what evaluation must know about the images.
    with told_when_disk_is_full(written):
        facts = replace(ModelFacts.from_metadata(read_metadata(written)), data=job.data.data, **base)
        report = save(model, written, metadata=metadata, facts=facts)
        annotate_result(job.output, data=job.data.data)
    if result.evaluation is not None:
        typer.echo(summary(result.evaluation))
    typer.echo(f"written: {report}")
    typer.echo(card_line(report))
    typer.echo(f"next: shiftaddvit evaluate {written} {job.val if job.val not in (None, 'none') else job.data.data}")
    if hasattr(model, "shiftaddvit_recipe"):
        typer.echo(f"      shiftaddvit convert {written} --packed --output {job.output / 'packed.safetensors'}")
        typer.echo(f"      shiftaddvit energy {written}")
    else:
        typer.echo(f"      shiftaddvit finetune {written} {job.data.data} --recipe ours-quant-moe --output {job.output}-shiftadd")


def _silent(text: str) -> None:
    """For processes other than the main one."""
