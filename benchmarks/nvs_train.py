"""The 3D table on real scenes: floors, NeRF, GNT and the converted rows, the same budget for each, on machines lent for minutes.

    python benchmarks/nvs_train.py SCENE[:WIDTH] … --state runs/nvs --output DIR --call-minutes 9 --minutes 8 --tune-minutes 1.6

Runs every row that is not done yet, one process a GPU (`--side-by-side 2`: two), until all are done or the call's minutes are over; the
same command goes on where it stopped. STATE keeps whole checkpoints (112 MB a row) and stays on the machine. OUTPUT gets what is worth
carrying away, rewritten after every row: `nvs.json` (scores of every held-out view, budgets, conditions), `SCENE.jpg` (each row beside
the truth and its error, with its depth) and GNT's weights in half precision, cut into parts of 15 MiB (`SCENE-gnt.0`, `.1`).
`--weights DIR` puts such an OUTPUT back into an empty STATE. Scenes travel as they are: the four test scenes are 15.6 MB together.

Budgets. `gnt` trains for --minutes. A converted row starts from it and fine-tunes for --tune-minutes; `gnt-longer` is GNT given the same
minutes more, the fair thing to compare with. `nerf` trains for both together, unless --nerf-minutes says otherwise. Minutes are of training alone; evaluation comes after.

What fits, planned and not yet measured: a step of 2048 rays × 64 samples × 10 views takes 0.75 TFLOP of products and some 60 GB of
traffic in eager bf16, so 50 to 80 ms on an H100: 6,000 to 9,600 steps in 8 minutes. With two GPUs for 27 minutes, three calls of 9:
  1. fern, flower: `--rows nearest sweep gnt` (8 minutes each, one a GPU)
  2. `--rows gnt-longer gnt-add gnt-add-shift gnt-add-shift-moe gnt-shift` (5 × 1.6 minutes a scene, one scene a GPU)
  3. `--rows nerf --nerf-minutes 8`, a little less than GNT and a row together; its budget is written in its row
Another 27 minutes do the same for cup:400 and carton:480. The order of --rows is the order of work.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from parts import cut, joined
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from shiftaddvit.conditions import conditions
from shiftaddvit.errors import UserError
from shiftaddvit.files import atomic_write, write_json
from shiftaddvit.nvs.choose import load_any
from shiftaddvit.nvs.evaluate import evaluate
from shiftaddvit.nvs.floors import Nearest, Sweep
from shiftaddvit.nvs.gnt import GNT, GNTConfig
from shiftaddvit.nvs.inspect import inspect_scene
from shiftaddvit.nvs.load import load_scene
from shiftaddvit.nvs.nerf import NeRF, NeRFConfig
from shiftaddvit.nvs.output import score_table
from shiftaddvit.nvs.pictures import write_png
from shiftaddvit.nvs.render import make_renderer
from shiftaddvit.nvs.rows import ROWS
from shiftaddvit.nvs.scene import Scene
from shiftaddvit.nvs.train import NvsTrainConfig, TrainResult, train
from shiftaddvit.nvs.video import depth_picture, error_picture
from shiftaddvit.reparam import reparameterize
from shiftaddvit.schema import stamped

FLOORS = ("nearest", "sweep")
ALL = (*FLOORS, "gnt", "gnt-longer", *ROWS, "nerf")
LEAST = 25.0
"""Seconds that must be left to start a row."""
SPARE = 20.0
"""Seconds before the end of the call at which training stops, to save and to evaluate another time."""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenes", nargs="+", help="scene folders, each with :WIDTH if the pictures are to be shrunk")
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--weights", type=Path, help="an earlier OUTPUT to start from")
    parser.add_argument("--call-minutes", type=float, default=9.0)
    parser.add_argument("--side-by-side", type=int, default=1, help="processes a GPU")
    parser.add_argument("--minutes", type=float, default=8.0, help="training of gnt")
    parser.add_argument("--tune-minutes", type=float, default=1.6, help="fine-tuning of converted rows")
    parser.add_argument("--nerf-minutes", type=float, help="training of nerf; by default both of the above")
    parser.add_argument("--rows", nargs="+", default=list(ALL), choices=ALL)
    parser.add_argument("--rays", type=int, default=2048)
    parser.add_argument("--samples", type=int, default=64, help="points along a ray in training")
    parser.add_argument("--render-samples", type=int, default=None, help="points along a ray when rendering, if not as trained")
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--model-width", type=int, default=64)
    parser.add_argument("--feature-base", type=int, default=64)
    parser.add_argument("--sources", type=int, default=10)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--tune-lr", type=float, default=2e-4)
    parser.add_argument("--precision", default="bf16", choices=("fp32", "bf16"))
    parser.add_argument("--compile", action="store_true", help="not for rows with mixtures")
    parser.add_argument(
        "--engine", default="plain", help="that renders the held-out views; their seconds are measured by shiftaddvit.nvs.engine.bench"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--one", nargs=2, metavar=("SCENE", "ROW"), help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def split(named: str) -> tuple[Path, int | None]:
    """SCENE:WIDTH."""
    folder, _, width = named.partition(":")
    if width and not width.isdigit():
        raise UserError(f"{named}: the width after ':' must be a whole number of pixels")
    return Path(folder), int(width) if width else None


# One row of one scene, in a process of its own.


def make_model(row: str, scene: Scene, folder: Path, given: argparse.Namespace) -> torch.nn.Module:
    torch.manual_seed(given.seed)
    if row in FLOORS:
        # The floor's planes follow the picture's width, as in the floor table.
        return Nearest() if row == "nearest" else Sweep(planes=96 if scene.width >= 504 else 64)
    if row == "nerf":
        return NeRF(NeRFConfig(ndc=inspect_scene(scene).forward_facing)).fit(scene)
    if row == "gnt":
        shape = GNTConfig(
            width=given.model_width, depth=given.depth, samples=given.samples, sources=given.sources, feature_base=given.feature_base, dropout=0.0
        )
        return GNT(shape)
    dense = load_any(folder / "gnt" / "model.safetensors")
    return dense if row == "gnt-longer" else reparameterize(dense, row)


def train_row(row: str, model: torch.nn.Module, scene: Scene, folder: Path, given: argparse.Namespace) -> tuple[TrainResult, dict]:
    nerf_minutes = given.nerf_minutes if given.nerf_minutes is not None else given.minutes + given.tune_minutes
    minutes = {"nerf": nerf_minutes, "gnt": given.minutes}.get(row, given.tune_minutes)
    lr = given.lr if row in ("nerf", "gnt") else given.tune_lr
    compile = given.compile and row != "gnt-add-shift-moe"
    config = NvsTrainConfig(
        steps=1_000_000, minutes=minutes, rays=given.rays, lr=lr, lr_features=2 * lr, precision=given.precision if row != "nerf" else "fp32",
        compile=compile, source_jitter=0 if compile else 2, seed=given.seed, check_every=500, checkpoint_minutes=1.0,
    )  # fmt: skip
    result = train(model, [scene], folder / row, config, given.device, resume=(folder / row / "run.json").exists(), show=False, until=given.until)
    before = 0.0 if row in ("nerf", "gnt") else given.minutes
    budget = {"minutes": minutes, "minutes_before": before, "steps": result.steps, "lr": lr, "rays": given.rays, "samples": model.samples}
    return result, budget


def one_row(given: argparse.Namespace) -> None:
    """Train (or go on training) and evaluate; STATE/SCENE/ROW.json when done."""
    named, row = given.one
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    source, width = split(named)
    scene, folder, start = load_scene(source, width), given.state / source.name, time.monotonic()
    model, budget = make_model(row, scene, folder, given), None
    if row not in FLOORS:
        result, budget = train_row(row, model, scene, folder, given)
        if not result.finished:
            print(f"{source.name} {row}: stopped after {result.steps} steps, {result.seconds:.0f} s, to go on")
            return
    own = row not in (*FLOORS, "nerf")
    if given.render_samples is not None and own:
        model.samples = given.render_samples
    renderer = make_renderer(model, scene, given.device, given.precision if own else "fp32", engine=given.engine if own else "plain")
    near, far = (bound / scene.unit for bound in scene.depth_range)

    def keep(view: int, picture, _score) -> None:
        if view == scene.test[0]:
            shown = torch.cat([error_picture(picture.rgb, scene.images[view].float() / 255), depth_picture(picture.depth, near, far)], dim=1)
            write_png(folder / f"{row}.png", shown)

    score = evaluate(renderer, seen=keep)
    print(score_table(score))
    facts = conditions(given.device, seed=given.seed, precision=renderer.precision)
    about = {"row": row, "engine": renderer.engine, "budget": budget, "seconds_in_all": time.monotonic() - start, "conditions": facts}
    write_json(folder / f"{row}.json", stamped("nvs-evaluate", score.to_dict() | about))


# All rows of all scenes, as far as the call's minutes go.


@dataclass
class Work:
    """One row of one scene, running."""

    scene: str
    """As named on the command line."""
    row: str
    """Which row."""
    process: subprocess.Popen
    """Its process."""
    slot: int
    """Its place among the processes at work."""


def ready(scene: str, row: str, state: Path) -> bool:
    """Whether what the row starts from is there."""
    folder = state / split(scene)[0].name
    return row in ("gnt", "nerf", *FLOORS) or (folder / "gnt.json").exists()


def done(scene: str, row: str, state: Path) -> bool:
    return (state / split(scene)[0].name / f"{row}.json").exists()


def work(given: argparse.Namespace) -> int:
    """Start rows as slots are free; returns how many are left. A row that fails is named and not tried again in this call."""
    end = time.monotonic() + 60 * given.call_minutes
    gpus = torch.cuda.device_count() if given.device.startswith("cuda") else 1
    slots, running, failed = list(range(gpus * given.side_by_side)), [], set()
    # Row by row over all scenes, so that scenes share the GPUs evenly and every GNT comes before what starts from one.
    wanted = [(scene, row) for row in given.rows for scene in given.scenes]
    while True:
        for item in [item for item in running if item.process.poll() is not None]:
            running.remove(item)
            slots.append(item.slot)
            if item.process.returncode not in (0, -signal.SIGTERM):
                failed.add((item.scene, item.row))
            report(item, given)
        at_work = {(item.scene, item.row) for item in running}
        left = [one for one in wanted if not done(*one, given.state) and one not in failed]
        startable = [one for one in left if one not in at_work and ready(*one, given.state)]
        if time.monotonic() > end - LEAST - SPARE:
            startable = []
        while slots and startable:
            running.append(start(*startable.pop(0), slots.pop(0), gpus, end, given))
        if not running:
            return len(left) + len(failed)
        if time.monotonic() > end:
            # Its training is saved; what it was evaluating is evaluated again in the next call.
            for item in running:
                item.process.terminate()
        time.sleep(0.5)


def start(scene: str, row: str, slot: int, gpus: int, end: float, given: argparse.Namespace) -> Work:
    folder = given.state / split(scene)[0].name
    folder.mkdir(parents=True, exist_ok=True)
    # The clock of time.monotonic() is the machine's, the same in every process.
    command = [sys.executable, __file__, *sys.argv[1:], "--one", scene, row, "--until", str(end - SPARE)]
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": str(slot % gpus)} if given.device.startswith("cuda") else {})
    with open(folder / f"{row}.log", "a") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
    print(f"start {split(scene)[0].name} {row}", flush=True)
    return Work(scene, row, process, slot)


def report(item: Work, given: argparse.Namespace) -> None:
    """Say how a row ended and rewrite OUTPUT."""
    name = split(item.scene)[0].name
    lines = (given.state / name / f"{item.row}.log").read_text().splitlines()
    ending = lines[-1] if lines else ""
    if item.process.returncode == -signal.SIGTERM:
        print(f"{name} {item.row}: the call's minutes are over", flush=True)
    elif item.process.returncode != 0:
        print(f"FAILED {name} {item.row}:\n" + "\n".join(lines[-12:]), flush=True)
    else:
        print(f"{name} {item.row}: {ending}", flush=True)
    collect(given)


def collect(given: argparse.Namespace) -> None:
    """Everything that is done, into OUTPUT."""
    given.output.mkdir(parents=True, exist_ok=True)
    table: dict[str, dict] = {}
    for named in given.scenes:
        name = split(named)[0].name
        folder = given.state / name
        table[name] = {row: json.loads((folder / f"{row}.json").read_text()) for row in ALL if (folder / f"{row}.json").exists()}
        pictures = [folder / f"{row}.png" for row in ALL if (folder / f"{row}.png").exists()]
        if pictures:
            sheet(pictures, given.output / f"{name}.jpg")
        if (folder / "gnt.json").exists() and not (given.output / f"{name}-gnt.0").exists():
            export(folder / "gnt" / "model.safetensors", given.output, f"{name}-gnt")
    write_json(given.output / "nvs.json", table)


def sheet(pictures: list[Path], path: Path) -> None:
    """Pictures below each other."""
    opened = [Image.open(picture) for picture in pictures]
    whole = Image.new("RGB", (opened[0].width, sum(one.height for one in opened)))
    top = 0
    for one in opened:
        whole.paste(one, (0, top))
        top += one.height
    with atomic_write(path) as temporary:
        whole.save(temporary, format="JPEG", quality=88)


def export(model: Path, folder: Path, name: str) -> None:
    """Weights in half precision, in parts that together are one safetensors file."""
    with safe_open(str(model), framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
        header = file.metadata()
    halves = {key: value.half() if value.is_floating_point() else value for key, value in tensors.items()}
    whole = folder / f".{name}.tmp"
    save_file(halves, whole, metadata=header)
    cut(whole, folder, name)
    whole.unlink()


def put_back(given: argparse.Namespace) -> None:
    """An earlier OUTPUT into STATE, where STATE has nothing of it."""
    table = json.loads((given.weights / "nvs.json").read_text())
    for named in given.scenes:
        name = split(named)[0].name
        folder = given.state / name
        for row, scores in table.get(name, {}).items():
            if not (folder / f"{row}.json").exists():
                write_json(folder / f"{row}.json", scores)
        model = folder / "gnt" / "model.safetensors"
        if not model.exists():
            joined(given.weights, f"{name}-gnt", model)


def main() -> None:
    given = parse()
    if given.one:
        one_row(given)
        return
    for named in given.scenes:
        load_scene(*split(named))  # what is wrong with a scene is better known before anything starts
    if given.weights is not None:
        put_back(given)
    left = work(given)
    collect(given)
    print("all rows are done" if left == 0 else f"{left} rows are left: run the same command again")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
