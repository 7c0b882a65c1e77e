"""`shiftaddvit bench`: speed of the ops, of whole models and of training, each checked before it is timed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from shiftaddvit.errors import UserError, unknown

from . import options
from .failures import refuse_existing

SLOWER_OR_WRONG = 3
"""Exit code when a result is wrong, or slower than the stored one."""

app = typer.Typer(
    help="Measure speed. Every contender is checked first; a wrong one has no time. Exit code 3: something was wrong, or slower than --against.",
    no_args_is_help=True,
    add_completion=False,
)

Models = Annotated[list[str] | None, typer.Argument(help="timm names, pvt_tiny … (default: pvt_v2_b0)")]
Recipes = Annotated[list[str] | None, typer.Option("--recipe", help="May be repeated; dense is the model as it is. (default: see above)")]
Batches = Annotated[list[int] | None, typer.Option("--batch", help="May be repeated. (default: 1, 32, 256; for models on a CPU 1, 8)")]
Side = Annotated[int, typer.Option("--image-size", help="Pixels of a side.")]
Compiled = Annotated[bool, typer.Option(help="Measure torch.compile too.")]
Quick = Annotated[bool, typer.Option("--quick", help="The few cases that tell most, in about five minutes.")]
Output = Annotated[Path | None, typer.Option("--json", help="Write the result here, after every row.")]
Against = Annotated[Path | None, typer.Option(help="A stored result of the same device: name what became slower.")]
Tolerance = Annotated[float, typer.Option(help="How much slower counts, as a share.")]


@app.command()
def ops(
    names: Annotated[list[str] | None, typer.Argument(help="matshift, matadd … (default: all)")] = None,
    batch: Batches = None,
    quick: Quick = False,
    as_json: Output = None,
    against: Against = None,
    tolerance: Tolerance = 0.05,
    overwrite: options.Overwrite = False,
) -> None:
    """Every kernel beside its baselines and its physical floor (needs a GPU)."""
    keep, stored = _files("ops-bench", as_json, against, overwrite)
    from shiftaddvit.ops.bench import bench_ops

    result = bench_ops(tuple(names or ()), tuple(batch or ((32,) if quick else (1, 32, 256))), compiled=not quick, show=typer.echo, keep=keep)
    _judge(result, stored, tolerance)


@app.command()
def model(
    models: Models = None,
    recipe: Recipes = None,
    batch: Batches = None,
    device: Annotated[str, typer.Option(help="cuda, cpu, or auto: a GPU where there is one.")] = "auto",
    dtype: Annotated[
        str | None,
        typer.Option(help="bfloat16, float16 or float32 on a GPU, of the engine; bfloat16 or float32 on a CPU. (default: bfloat16, on a CPU both)"),
    ] = None,
    threads: Annotated[int, typer.Option(help="On a CPU.")] = 2,
    compiled: Compiled = True,
    steps: Annotated[bool, typer.Option(help="On a GPU also time every step of the engine.")] = True,
    quick: Quick = False,
    as_json: Output = None,
    against: Against = None,
    tolerance: Tolerance = 0.05,
    overwrite: options.Overwrite = False,
) -> None:
    """Whole models: the engine, converted (by default to ours-quant-moe, on a CPU to ours-quant-shift too) and dense, beside timm's model
    compiled, graphed and eager."""
    keep, stored = _files("engine-bench", as_json, against, overwrite)
    import torch

    names, minutes = _named(models), 4.0 if quick else 30.0
    if options.one_of("--device", device, ("auto", "cuda", "cpu")) == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        from shiftaddvit.engine.bench_cpu import CpuPlan, bench_cpu

        chosen = _converted(recipe, ("ours-quant-moe", "ours-quant-shift"))
        dtypes = (dtype,) if dtype else CpuPlan.dtypes
        plan = CpuPlan(names, chosen, tuple(batch or (1, 8)), threads, compiled, 20 if quick else 60, minutes, dtypes)
        result = bench_cpu(plan, show=typer.echo, keep=keep)
    else:
        from shiftaddvit.engine.bench import Plan, bench_models

        chosen = _converted(recipe, ("ours-quant-moe",))
        plan = Plan(names, chosen, tuple(batch or (1, 32, 256)), dtype or Plan.dtype, compiled=compiled, steps=steps, minutes=minutes)
        result = bench_models(plan, show=typer.echo, keep=keep)
    _judge(result, stored, tolerance)


@app.command()
def train(
    models: Models = None,
    recipe: Recipes = None,
    batch_size: Annotated[int, typer.Option(help="Images a step.")] = 256,
    image_size: Side = 224,
    precision: options.Precision = "bf16",
    compiled: Compiled = True,
    quick: Quick = False,
    as_json: Output = None,
    against: Against = None,
    tolerance: Tolerance = 0.05,
    overwrite: options.Overwrite = False,
) -> None:
    """A fine-tuning step, dense and converted (by default to ours-quant-add, ours-quant-shift and ours-quant-moe): time, images a second,
    memory."""
    keep, stored = _files("train-bench", as_json, against, overwrite)
    from shiftaddvit.bench import TrainPlan, bench_training
    from shiftaddvit.bench.train import MODES

    chosen = ("dense", *_converted(recipe, ("ours-quant-moe",) if quick else TrainPlan.recipes))
    plan = TrainPlan(
        _named(models), chosen, MODES if compiled else MODES[:2], batch_size, image_size, precision,
        steps=15 if quick else 30, minutes=4.0 if quick else 20.0,
    )  # fmt: skip
    result = bench_training(plan, show=typer.echo, keep=keep)
    _judge(result, stored, tolerance)


@app.command()
def tiles(
    models: Models = None,
    recipe: Recipes = None,
    batch: Batches = None,
    image_size: Side = 224,
    seconds: Annotated[float, typer.Option(help="Stop after about so long for each model and recipe; what was measured is kept.")] = 240.0,
    again: Annotated[bool, typer.Option("--again", help="Also those that have been measured on this kind of GPU.")] = False,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Add to this table instead of the user's cache.")] = None,
) -> None:
    """Measure the tiles of the engine's kernels for these models (by default ours-quant-moe and dense) on this GPU; `deploy` does so by
    itself for what is new to it."""
    import torch

    from shiftaddvit.engine.lower import lower
    from shiftaddvit.engine.tune import best_tiles, tune
    from shiftaddvit.ops.tiling import save_tuned
    from shiftaddvit.reparam import recipes, reparameterize
    from shiftaddvit.reparam.architecture import create_model

    if not torch.cuda.is_available():
        raise UserError("measuring tiles needs a CUDA device")
    device = torch.device("cuda", torch.cuda.current_device())
    for name in _named(models):
        for key in _known(recipe, ("ours-quant-moe", "dense")):
            network = create_model(name, {} if name.startswith("pvt_v2") else {"img_size": image_size}).eval()
            network = network if key == "dense" else reparameterize(network, recipes[key])
            program = lower(network, torch.bfloat16, image_size, device)
            walks = tune(program, tuple(batch or (1, 32, 256)), seconds=seconds, measured_too=again)
            for walk in walks:
                typer.echo(f"{name} {key} {walk.problem:34s}{walk.start_us:9.2f} → {walk.best_us:9.2f} µs, {len(walk.seen)} tried  {walk.best}")
            typer.echo(f"wrote {save_tuned(device, best_tiles(walks), output)}")


def _named(models: list[str] | None) -> tuple[str, ...]:
    """Looked at before anything is measured: a name that does not exist is a mistake, not a contender that fails."""
    from shiftaddvit.reparam.architecture import check_name

    names = tuple(models or ("pvt_v2_b0",))
    for name in names:
        check_name(name)
    return names


def _known(given: list[str] | None, usual: tuple[str, ...]) -> tuple[str, ...]:
    from shiftaddvit.reparam.recipe import LISTED_BY, recipes

    for name in given or ():
        if name != "dense" and name not in recipes:
            raise unknown("recipe", name, [*recipes, "dense"], LISTED_BY)
    return tuple(given or usual)


def _converted(given: list[str] | None, usual: tuple[str, ...]) -> tuple[str, ...]:
    """Without the dense model, which is measured in any case."""
    return tuple(name for name in _known(given, usual) if name != "dense")


def _files(kind: str, as_json: Path | None, against: Path | None, overwrite: bool) -> tuple[Callable[[dict], None], dict | None]:
    """What keeps a result of this kind, and the stored one; both looked at before anything is measured."""
    from shiftaddvit.files import write_json
    from shiftaddvit.schema import stamped

    refuse_existing(as_json, overwrite)
    stored = None
    if against is not None:
        try:
            stored = json.loads(against.read_text())
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise UserError(f"{against} is no benchmark result: {error}") from None

    def keep(result: dict) -> None:
        if as_json is not None:
            write_json(as_json, stamped(kind, result))

    return keep, stored


def _judge(result: dict, stored: dict | None, tolerance: float) -> None:
    from shiftaddvit.bench import is_wrong, regressions

    wrong = [row for row in result["rows"] if is_wrong(row)]
    slower = regressions(result, stored, tolerance) if stored is not None else []
    for found in slower:
        typer.echo(f"slower than stored: {found}", err=True)
    if stored is not None and not slower:
        typer.echo(f"nothing is slower than stored by more than {tolerance:.0%} and its spread")
    if wrong or slower:
        typer.echo(f"{len(wrong)} wrong or failed, {len(slower)} slower", err=True)
        raise typer.Exit(SLOWER_OR_WRONG)
