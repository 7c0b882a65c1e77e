"""`shiftaddvit finetune` and `pretrain`: training, in stages and resumable; under torchrun, one process a device."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shiftaddvit.errors import UserError

from . import options
from .energy import parse_size
from .model_choice import ModelChoice

if TYPE_CHECKING:
    from shiftaddvit.train import FinetuneConfig

Output = Annotated[Path, typer.Option("--output", "-o", help="Folder of the run: log, checkpoint, result, model.safetensors.")]
Resident = Annotated[str, typer.Option(help="Keep the decoded images on the device: auto, yes or no.")]
Augment = Annotated[str, typer.Option(help="default (as PVT and DeiT are trained), light (shifts and flips) or none.")]
Val = Annotated[str | None, typer.Option(help="Validation images, where DATA has none; 'none' for no validation.")]
Seed = Annotated[int, typer.Option(help="Of everything random.")]
Ema = Annotated[float | None, typer.Option(help="Decay of an average of the weights, such as 0.9998; the average is the result.")]
Compile = Annotated[bool, typer.Option("--compile", help="torch.compile the model.")]
CudaGraph = Annotated[bool, typer.Option("--cuda-graph/--no-cuda-graph", help="On one GPU, record a step once and replay it: same numbers, sooner.")]
TensorBoard = Annotated[bool, typer.Option("--tensorboard", help="Write TensorBoard events too.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run in the output folder.")]


def finetune(
    model: options.Model,
    data: options.Data,
    output: Output,
    recipe: options.RecipeName = None,
    weights: options.Weights = None,
    pretrained: options.Pretrained = False,
    num_classes: options.Classes = None,
    model_arg: options.ModelArgs = None,
    schedule: Annotated[str, typer.Option(help="default, or published: the paper's for ImageNet, 100 + 100 epochs.")] = "default",
    epochs: Annotated[tuple[int, int] | None, typer.Option(help="Of the first stage (attention) and the second (linears). (default: 10 10)")] = None,
    lr: Annotated[tuple[float, float] | None, typer.Option(help="Peak learning rates of both stages at a total batch of 512. (default: 0.001 0.001)")] = None,
    batch_size: options.BatchSize = 64,
    image_size: options.ImageSize = None,
    crop_pct: options.CropPct = None,
    workers: options.Workers = None,
    resident: Resident = "auto",
    precision: Annotated[str | None, typer.Option(help="no (float32), fp16 or bf16. (default: no; published: fp16)")] = None,
    augment: Augment = "default",
    val: Val = None,
    distill: Annotated[float, typer.Option(help="Share of the loss that comes from the dense model, 0 to 1.")] = 0.0,
    teacher: Annotated[str | None, typer.Option(help="Saved dense model to distil from. (default: the model before conversion)")] = None,
    ema: Ema = None,
    seed: Seed = 0,
    compile: Compile = False,
    cuda_graph: CudaGraph = True,
    tensorboard: TensorBoard = False,
    checkpoint_minutes: Annotated[float, typer.Option(help="Longest time between checkpoints.")] = 5.0,
    evaluate_every: Annotated[int, typer.Option(help="Epochs between evaluations; 0 evaluates at the end only.")] = 1,
    resume: Resume = False,
    overwrite: options.Overwrite = False,
    strict: options.Strict = False,
    data_root: options.DataRoot = None,
    download: options.Download = False,
    verbose: options.Verbose = False,
) -> None:
    """Convert a pre-trained model and train it in two stages: attention, then linears."""
    from .training import DataChoice, Job, train

    options.one_of("--schedule", schedule, ("default", "published"))
    choice = _choice(model, model_arg, weights, pretrained, num_classes, image_size, seed)
    if recipe is None and not choice.is_file:
        raise UserError(f"say what {model} becomes with --recipe (see 'shiftaddvit recipes'; dense trains it as it is)")
    config = _settings(_schedule(schedule, epochs, lr), precision, distill, ema, seed, compile, cuda_graph, tensorboard,
                       checkpoint_minutes, evaluate_every)  # fmt: skip
    job = Job(choice, DataChoice(data, strict, data_root, download), output, recipe, val, teacher, batch_size, workers, resident, augment,
              crop_pct, resume, overwrite, verbose)  # fmt: skip
    train(job, config)


def pretrain(
    model: options.Model,
    data: options.Data,
    output: Output,
    epochs: Annotated[int, typer.Option(help="Passes over the training images.")] = 100,
    lr: Annotated[float, typer.Option(help="Peak learning rate at a total batch of 512.")] = 1e-3,
    weights: options.Weights = None,
    num_classes: options.Classes = None,
    model_arg: options.ModelArgs = None,
    batch_size: options.BatchSize = 64,
    image_size: options.ImageSize = None,
    crop_pct: options.CropPct = None,
    workers: options.Workers = None,
    resident: Resident = "auto",
    precision: options.Precision = "no",
    augment: Augment = "default",
    val: Val = None,
    ema: Ema = None,
    seed: Seed = 0,
    compile: Compile = False,
    cuda_graph: CudaGraph = True,
    tensorboard: TensorBoard = False,
    checkpoint_minutes: Annotated[float, typer.Option(help="Longest time between checkpoints.")] = 5.0,
    evaluate_every: Annotated[int, typer.Option(help="Epochs between evaluations; 0 evaluates at the end only.")] = 1,
    resume: Resume = False,
    overwrite: options.Overwrite = False,
    strict: options.Strict = False,
    data_root: options.DataRoot = None,
    download: options.Download = False,
    verbose: options.Verbose = False,
) -> None:
    """Train a dense model, from random weights or given ones."""
    from shiftaddvit.train import pretraining

    from .training import DataChoice, Job, train

    choice = _choice(model, model_arg, weights, False, num_classes, image_size, seed)
    config = _settings(pretraining(epochs, lr, seed, ema), precision, 0.0, ema, seed, compile, cuda_graph, tensorboard,
                       checkpoint_minutes, evaluate_every)  # fmt: skip
    job = Job(choice, DataChoice(data, strict, data_root, download), output, "dense", val, None, batch_size, workers, resident, augment,
              crop_pct, resume, overwrite, verbose)  # fmt: skip
    train(job, config)


def _choice(model: str, model_arg: list[str] | None, weights: Path | None, pretrained: bool, num_classes: int | None,
            image_size: str | None, seed: int) -> ModelChoice:  # fmt: skip
    size = parse_size(image_size)
    size = (size, size) if isinstance(size, int) else size
    return ModelChoice(model, options.model_args(model_arg), weights, pretrained, num_classes, size, seed)


def _schedule(name: str, epochs: tuple[int, int] | None, lr: tuple[float, float] | None) -> "FinetuneConfig":
    """The stages; `--epochs 0 N` leaves the first one out."""
    from shiftaddvit.train import FinetuneConfig

    config = FinetuneConfig.published() if name == "published" else FinetuneConfig()
    first, second = config.stages
    if lr is not None:
        first, second = replace(first, lr=lr[0]), replace(second, lr=lr[1])
    if epochs is None:
        return replace(config, stages=(first, second))
    if epochs[1] < 1 or epochs[0] < 0:
        raise UserError(f"--epochs needs 0 or more for the first stage and at least 1 for the second, got {epochs[0]} {epochs[1]}")
    both = (replace(first, epochs=epochs[0]), replace(second, epochs=epochs[1])) if epochs[0] else (replace(second, epochs=epochs[1]),)
    return replace(config, stages=both)


def _settings(config: "FinetuneConfig", precision: str | None, distill: float, ema: float | None, seed: int, compile: bool,
              cuda_graph: bool, tensorboard: bool, checkpoint_minutes: float, evaluate_every: int) -> "FinetuneConfig":  # fmt: skip
    if evaluate_every < 0 or checkpoint_minutes < 0:
        raise UserError(f"--evaluate-every and --checkpoint-minutes must be 0 or more, got {evaluate_every} and {checkpoint_minutes:g}")
    if seed < 0:
        raise UserError(f"--seed must be 0 or more, got {seed}")
    if ema is not None and not 0 < ema < 1:
        raise UserError(f"--ema must be between 0 and 1, got {ema:g}")
    changed: dict[str, Any] = {} if precision is None else {"precision": precision}
    return replace(
        config, distill_weight=distill, ema_decay=ema, seed=seed, compile=compile, cuda_graph=cuda_graph, tensorboard=tensorboard,
        checkpoint_minutes=checkpoint_minutes, evaluate_every=evaluate_every, **changed,
    )  # fmt: skip
