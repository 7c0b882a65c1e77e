"""`shiftaddvit evaluate`: accuracy of a saved model, and of two on the same images."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shiftaddvit.errors import UserError
from shiftaddvit.processes import leave, this_process

from . import options
from .energy import parse_size
from .failures import refuse_existing, told_when_memory_ends

if TYPE_CHECKING:
    import torch

    from shiftaddvit.evaluation import Evaluation, Paired


def evaluate(
    file: Annotated[str, typer.Argument(help="A .safetensors file that shiftaddvit wrote.")],
    data: options.Data,
    against: Annotated[str | None, typer.Option(help="Another such file, evaluated on the same images and compared in pairs.")] = None,
    split: Annotated[str, typer.Option(help="train, val or test.")] = "val",
    batch_size: options.BatchSize = 128,
    image_size: options.ImageSize = None,
    crop_pct: options.CropPct = None,
    workers: options.Workers = None,
    precision: options.Precision = "no",
    as_json: options.JsonFile = None,
    strict: options.Strict = False,
    ignore_class_names: options.IgnoreNames = False,
    data_root: options.DataRoot = None,
    download: options.Download = False,
    overwrite: options.Overwrite = False,
) -> None:
    """Top-1, top-5, loss and images a second, with the 95 % interval."""
    refuse_existing(json_path(as_json), overwrite)
    amp_dtype = autocast_type(precision)

    from shiftaddvit.data.sources import NoSplit, check_class_names
    from shiftaddvit.evaluation import compare
    from shiftaddvit.schema import stamped

    from .image_choice import DataChoice
    from .model_choice import ModelChoice, check_saved

    state = this_process()
    quiet = as_json == "-" or not state.is_main_process
    files = [file] if against is None else [file, against]
    for path in files:
        check_saved(path)
    try:
        images = DataChoice(data, strict, data_root, download).open(split)
    except NoSplit as error:
        raise UserError(f"{error}; choose with --split") from None
    for path in files:  # all before the first is evaluated, which takes long
        check_class_names(images, ModelChoice(path).stored().get("classes"), path, ignore_class_names)
    found: dict[str, Evaluation] = {}
    for path in files:
        with told_when_memory_ends(batch_size):
            found[path] = _evaluate(path, images, image_size, crop_pct, batch_size, workers, amp_dtype, state.device, quiet)
        if not quiet:
            typer.echo(f"{path}: {summary(found[path])}")
    result: dict[str, Any] = {"file": file, **model_facts(file), "data": data, "split": split, "precision": precision, **found[file].to_json()}
    if against is not None:
        paired = compare(found[file], found[against])
        result |= {"against": {"file": against, **model_facts(against), **found[against].to_json()}, "paired": paired.to_json()}
        if not quiet:
            typer.echo(_paired_line(file, against, paired))
    if state.is_main_process:
        write_result(stamped("evaluate", result), as_json)
    leave(state)


def model_facts(file: str) -> dict[str, Any]:
    """What a saved model is: architecture and recipe (None for a dense one), as result files say it."""
    from shiftaddvit.serialization import read_header

    header = read_header(file)
    return {"model": header["architecture"], "recipe": header["recipe"]}


def summary(evaluation: "Evaluation") -> str:
    """One line for people."""
    low, high = evaluation.interval95
    unreadable = f", {evaluation.unreadable} unreadable images left out" if evaluation.unreadable else ""
    return (
        f"top-1 {evaluation.top1:.2f} % (95 % interval {low:.2f} … {high:.2f}), top-5 {evaluation.top5:.2f} %, loss {evaluation.loss:.4f}, "
        f"{evaluation.images} images, {evaluation.images_per_second:.0f} images/s with loading{unreadable}"
    )


def autocast_type(precision: str) -> "torch.dtype | None":
    """What `--precision` means for evaluation."""
    import torch

    options.one_of("--precision", precision, ("no", "fp16", "bf16"))
    return {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]


def json_path(as_json: str | None) -> Path | None:
    """The file that `--json` names, if it names one."""
    return None if as_json in (None, "-") else Path(as_json)


def write_result(result: dict[str, Any], as_json: str | None) -> None:
    """JSON to where `--json` says."""
    import json

    from shiftaddvit.files import write_json

    if as_json == "-":
        sys.stdout.write(json.dumps(result, indent=1, allow_nan=False) + "\n")
    elif as_json is not None:
        write_json(as_json, result)
        typer.echo(f"written: {as_json}")


def _evaluate(path: str, images: Any, image_size: str | None, crop_pct: float | None, batch_size: int, workers: int | None,
              amp_dtype: "torch.dtype | None", device: "torch.device", quiet: bool) -> "Evaluation":  # fmt: skip
    from shiftaddvit.data.sources import check_classes
    from shiftaddvit.evaluation import evaluate as run

    from .image_choice import evaluation_loader, image_form
    from .model_choice import ModelChoice, open_model

    size = parse_size(image_size)
    size = (size, size) if isinstance(size, int) else size
    choice = ModelChoice(path, image_size=size)
    network = open_model(choice, lambda text: typer.echo(text, err=True))
    check_classes(images, network.num_classes)
    form = image_form(network, size, crop_pct, choice.stored())
    loader = evaluation_loader(images, form, batch_size, workers, device)
    return run(network, loader, device=device, amp_dtype=amp_dtype, progress=not quiet)


def _paired_line(first: str, second: str, paired: "Paired") -> str:
    low, high = paired.interval95
    return (
        f"{first} − {second}: {paired.difference:+.2f} points (95 % interval {low:+.2f} … {high:+.2f}, p = {paired.p_value:.3g}); "
        f"{paired.only_first} images only the first gets right, {paired.only_second} only the second"
    )
