"""`shiftaddvit nvs …`: from a folder of photos to new views."""

import json
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from shiftaddvit.errors import UserError

from .failures import refuse_unwritable

app = typer.Typer(
    help="Novel view synthesis: prepare photos, train GNT or NeRF, convert to shifts and adds, render, evaluate.",
    no_args_is_help=True,
    add_completion=False,
)


class Model(str, Enum):
    """What `nvs train` can start from nothing."""

    gnt = "gnt"
    nerf = "nerf"


class Precision(str, Enum):
    """Of matrix products."""

    fp32 = "fp32"
    bf16 = "bf16"


class RenderPrecision(str, Enum):
    """Of rendering."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class RenderEngine(str, Enum):
    """What renders."""

    auto = "auto"
    plain = "plain"
    compiled = "compiled"
    fused = "fused"


SceneFolder = Annotated[Path, typer.Argument(help="Folder with poses_bounds.npy, transforms.json or a COLMAP model in sparse/.")]
Width = Annotated[int | None, typer.Option(help="Shrink pictures to this width.")]
Hold = Annotated[int, typer.Option("--hold-out", help="Hold out every so-many-th view for test; 0 holds out none.")]
Near = Annotated[float | None, typer.Option(help="Nearest depth, in the scene file's units, if the file's is wrong or missing.")]
Far = Annotated[float | None, typer.Option(help="Farthest depth, likewise.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 …; auto takes a GPU where there is one.")]
Bits = Annotated[Precision, typer.Option("--precision", help="bf16 is faster on a GPU; geometry stays in float32.")]
RenderBits = Annotated[RenderPrecision, typer.Option("--precision", help="bf16 and fp16 are faster on a GPU; geometry stays in float32.")]
Engine = Annotated[
    RenderEngine, typer.Option(help="plain PyTorch, compiled, or fused (GNT's own kernels); auto takes fused on a GPU where the model has it.")
]


@app.command()
def prepare(
    photos: Annotated[Path, typer.Argument(help="Folder of photos of one still scene, taken by one camera.")],
    output: Annotated[Path, typer.Argument(help="New folder for the scene.")],
    longest: Annotated[int, typer.Option(help="Shrink photos so that their longer side has this many pixels.")] = 1600,
) -> None:
    """Find the cameras of a folder of photos (structure from motion) and write a scene folder."""
    from shiftaddvit.nvs.prepare import prepare as run

    done = run(photos, output, longest)
    typer.echo(f"placed {len(done.scene)} of {len(done.scene) + len(done.dropped)} photos, {done.pixel_error:.2f} px reprojection error")
    if done.dropped:
        typer.echo(f"not placed: {', '.join(done.dropped)}")
    if done.models > 1:
        typer.echo(f"the photos fell into {done.models} separate groups; the largest was kept")
    typer.echo(f"scene written to {done.folder}; next: shiftaddvit nvs inspect {done.folder}")


@app.command()
def inspect(
    scene: SceneFolder,
    width: Width = None,
    hold_out: Hold = 8,
    near: Near = None,
    far: Far = None,
    picture: Annotated[Path | None, typer.Option(help="Write a PNG of the cameras here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show a scene's views, spread, bounds and overlap, and whether it is forward-facing."""
    from shiftaddvit.nvs.inspect import cameras_picture, inspect_scene
    from shiftaddvit.nvs.load import load_scene
    from shiftaddvit.nvs.pictures import write_png

    loaded = load_scene(scene, width, hold_out, near, far)
    found = inspect_scene(loaded)
    if picture is not None:
        write_png(picture, cameras_picture(loaded))
    if as_json:
        typer.echo(json.dumps(asdict(found) | {"advice": found.advice}, indent=1))
        return
    typer.echo(f"{loaded.name}: {found.views} views of {found.width}×{found.height}, {found.test} held out, {found.field_of_view:.0f}° wide")
    typer.echo(f"depth {found.near:.3g} … {found.far:.3g}; cameras spread over {found.spread:.2f} of the near depth, turn up to {found.turn:.0f}°")
    typer.echo(f"overlap {found.overlap:.0%}; forward-facing: {'yes' if found.forward_facing else 'no'}")
    if found.dropped:
        typer.echo(f"pictures without a pose: {', '.join(found.dropped)}")
    typer.echo(found.advice)


@app.command()
def train(
    scenes: Annotated[list[Path], typer.Argument(help="One scene folder, or several to train across scenes.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the run.")],
    model: Annotated[Model, typer.Option(help="What to train from nothing.")] = Model.gnt,
    start: Annotated[Path | None, typer.Option("--from", help="Start from this model: .safetensors of a run, or a published GNT .pth.")] = None,
    recipe: Annotated[str | None, typer.Option(help="Convert first: gnt-add, gnt-add-shift, gnt-add-shift-moe, gnt-shift, or a TOML file.")] = None,
    width: Width = None,
    hold_out: Hold = 8,
    near: Near = None,
    far: Far = None,
    steps: Annotated[int, typer.Option(help="Optimisation steps.")] = 20_000,
    minutes: Annotated[float | None, typer.Option(help="Stop after so many minutes, if that is sooner.")] = None,
    rays: Annotated[int, typer.Option(help="Rays a step.")] = 2048,
    lr: Annotated[float, typer.Option(help="Learning rate; the feature net has twice as much.")] = 5e-4,
    samples: Annotated[int | None, typer.Option(help="Points along a ray: 192 published for GNT, 64 for quick runs.")] = None,
    sources: Annotated[int | None, typer.Option(help="Source views that GNT looks at; 10 published.")] = None,
    model_width: Annotated[int | None, typer.Option(help="Channels of GNT's transformer; 64 published.")] = None,
    depth: Annotated[int | None, typer.Option(help="Blocks of GNT: 4 for one scene, 8 for many.")] = None,
    precision: Bits = Precision.fp32,
    compile: Annotated[bool, typer.Option("--compile", help="torch.compile the model.")] = False,
    seed: int = 0,
    device: Device = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the output folder.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in the output folder.")] = False,
) -> None:
    """Train on one scene or across scenes, from nothing or after conversion."""
    from shiftaddvit.nvs.choose import check_recipe, choose_device, choose_model
    from shiftaddvit.nvs.load import load_scene
    from shiftaddvit.nvs.train import NvsTrainConfig
    from shiftaddvit.nvs.train import train as run

    check_recipe(recipe)
    loaded = [load_scene(folder, width, hold_out, near, far) for folder in scenes]
    shape = {"samples": samples, "sources": sources, "width": model_width, "depth": depth}
    chosen = choose_model(model.value, start, recipe, shape, loaded[0], seed)
    config = NvsTrainConfig(
        steps=steps, minutes=minutes, rays=rays, lr=lr, lr_features=2 * lr, precision=precision.value, compile=compile, seed=seed
    )  # fmt: skip
    result = run(chosen, loaded, output, config, choose_device(device), resume, overwrite)
    held_out = "" if result.held_out_psnr is None else f", held out {result.held_out_psnr:.2f} dB"
    typer.echo(f"{result.steps} steps in {result.seconds:.0f} s{held_out}; model in {output / 'model.safetensors'}")


@app.command()
def render(
    scene: SceneFolder,
    model: Annotated[Path, typer.Argument(help="model.safetensors of a run, or a published GNT .pth.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for pictures, depth and video.")],
    path: Annotated[
        str, typer.Option(help="held-out, spiral, interpolated, or a JSON file of poses; auto: spiral if the scene faces one way, else interpolated.")
    ] = "auto",
    frames: Annotated[int, typer.Option(help="Pictures of a spiral or interpolated path.")] = 60,
    rate: Annotated[int, typer.Option(help="Pictures a second in the video.")] = 30,
    width: Width = None,
    hold_out: Hold = 8,
    near: Near = None,
    far: Far = None,
    samples: Annotated[int | None, typer.Option(help="Points along a ray, if not as trained.")] = None,
    chunk: Annotated[int | None, typer.Option(help="Rays at once; by default what the memory suggests.")] = None,
    precision: RenderBits = RenderPrecision.fp32,
    engine: Engine = RenderEngine.auto,
    device: Device = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the pictures and videos in the output folder.")] = False,
) -> None:
    """Render a camera path to PNG, depth and MP4; held-out views also beside the truth with their error."""
    from shiftaddvit.nvs.choose import choose_device, choose_path, load_any
    from shiftaddvit.nvs.load import load_scene
    from shiftaddvit.nvs.output import write_frames, written_frames
    from shiftaddvit.nvs.render import make_renderer

    refuse_unwritable(output / "000.png")
    if not overwrite and written_frames(output):
        raise UserError(f"{output} already holds pictures: replace them (--overwrite) or choose another folder (--output)")
    loaded = load_scene(scene, width, hold_out, near, far)
    cameras = choose_path(path, loaded, frames)
    renderer = make_renderer(load_any(model, samples), loaded, choose_device(device), precision.value, chunk, engine.value)
    typer.echo(f"engine: {renderer.engine}", err=True)
    truth = [loaded.images[view].float() / 255 for view in loaded.test] if path == "held-out" else None
    seconds = write_frames(renderer, cameras, output, rate, truth)
    typer.echo(f"{len(cameras)} pictures, {seconds:.2f} s each (features {renderer.encode_seconds:.1f} s once), in {output}")


@app.command()
def evaluate(
    scene: SceneFolder,
    model: Annotated[str, typer.Argument(help="model.safetensors, a published GNT .pth, or a floor: nearest, sweep.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the scores as JSON here.")] = None,
    lpips: Annotated[Path | None, typer.Option(help="torchvision's vgg16 weights, for LPIPS; without them it is not computed.")] = None,
    width: Width = None,
    hold_out: Hold = 8,
    near: Near = None,
    far: Far = None,
    samples: Annotated[int | None, typer.Option(help="Points along a ray, if not as trained.")] = None,
    precision: RenderBits = RenderPrecision.fp32,
    engine: Engine = RenderEngine.auto,
    device: Device = "auto",
) -> None:
    """PSNR, SSIM and (with weights) LPIPS of the held-out views."""
    from shiftaddvit.conditions import conditions
    from shiftaddvit.files import write_json
    from shiftaddvit.nvs.choose import choose_device, load_any
    from shiftaddvit.nvs.evaluate import evaluate as run
    from shiftaddvit.nvs.load import load_scene
    from shiftaddvit.nvs.metrics import Lpips
    from shiftaddvit.nvs.output import score_table
    from shiftaddvit.nvs.render import make_renderer
    from shiftaddvit.schema import stamped

    loaded, place = load_scene(scene, width, hold_out, near, far), choose_device(device)
    perceive = Lpips(lpips, place) if lpips is not None else None
    renderer = make_renderer(load_any(model, samples), loaded, place, precision.value, engine=engine.value)
    typer.echo(f"engine: {renderer.engine}", err=True)
    score = run(renderer, perceive, lambda view, _, found: typer.echo(f"{found.name}: {found.psnr:.2f} dB, {found.seconds:.2f} s", err=True))
    typer.echo(score_table(score))
    if output is not None:
        described = {"model": str(model), "engine": renderer.engine, "conditions": conditions(place, precision=precision.value)}
        write_json(output, stamped("nvs-evaluate", score.to_dict() | described))


@app.command()
def bench(
    scene: SceneFolder,
    rows: Annotated[list[str] | None, typer.Option("--row", help="nerf, gnt, gnt-add, …; NAME=FILE times that file's model. Default: all.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the result as JSON here.")] = None,
    width: Width = None,
    samples: Annotated[int | None, typer.Option(help="Points along a ray; 192 published for GNT.")] = None,
    repeats: Annotated[int, typer.Option(help="Renderings of one view; the median counts.")] = 3,
    precision: RenderBits = RenderPrecision.fp32,
    engine: Engine = RenderEngine.auto,
    device: Device = "auto",
) -> None:
    """Seconds an image of NeRF, GNT and every converted row, with the published figures beside them."""
    from shiftaddvit.files import write_json
    from shiftaddvit.nvs.bench import bench_result, time_row
    from shiftaddvit.nvs.choose import choose_device, row_model
    from shiftaddvit.nvs.load import load_scene
    from shiftaddvit.nvs.output import bench_table
    from shiftaddvit.nvs.rows import ROWS

    loaded, place = load_scene(scene, width), choose_device(device)
    timings = []
    for row in rows or ["nerf", "gnt", *ROWS]:
        name, model = row_model(row, loaded, samples)
        timings.append(time_row(name, model, loaded, place, precision.value, repeats, engine.value))
        typer.echo(f"{name}: {timings[-1].seconds:.3f} s an image, {timings[-1].engine}", err=True)
    result = bench_result(timings, loaded, place, precision.value, repeats)
    typer.echo(bench_table(result))
    if output is not None:
        write_json(output, result)


@app.command()
def quickstart(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the strip and the models.")] = Path("nvs-quickstart"),
    recipe: Annotated[str, typer.Option(help="Which row of the 3D table to convert to.")] = "gnt-add-shift-moe",
    train_minutes: Annotated[float, typer.Option(help="Training of the small GNT.")] = 1.4,
    tune_minutes: Annotated[float, typer.Option(help="Fine-tuning after conversion.")] = 0.4,
    device: Device = "cpu",
) -> None:
    """The whole path on the embedded scene in under four minutes on two cores: floor, small GNT, conversion, picture strip."""
    from shiftaddvit.nvs.choose import check_recipe, choose_device
    from shiftaddvit.nvs.quickstart import quickstart as run

    check_recipe(recipe)
    result = run(output, recipe, train_minutes, tune_minutes, choose_device(device), typer.echo)
    typer.echo(f"{result.seconds:.0f} s in all; truth, {', '.join(result.scores)} (depth below): {result.strip}")
