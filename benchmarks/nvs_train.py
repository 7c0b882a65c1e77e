"""The 3D table on one scene: floors, NeRF, GNT and the converted rows, the same budget for each.

    python benchmarks/nvs_train.py SCENE --output DIR --width 504 --minutes 8 --tune-minutes 4 --rows sweep gnt gnt-shift

`gnt` trains for --minutes. A converted row starts from DIR/gnt and fine-tunes for --tune-minutes; `gnt-longer` is GNT given the same
minutes more, the fair thing to compare with. `nerf` trains for both together. Rows that are done are skipped, and a row that was killed is
resumed, so the same command can be called again. Each row leaves DIR/ROW.json: scores of every held-out view, seconds an image, budget,
conditions.
"""

import argparse
import json
import time
from pathlib import Path

import torch

from shiftaddvit.conditions import conditions
from shiftaddvit.files import write_json
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
from shiftaddvit.schema import stamped
from shiftaddvit.nvs.scene import Scene
from shiftaddvit.nvs.train import NvsTrainConfig, train
from shiftaddvit.nvs.video import depth_picture, error_picture
from shiftaddvit.reparam import reparameterize

FLOORS = ("nearest", "sweep")
ALL = (*FLOORS, "nerf", "gnt", "gnt-longer", *ROWS)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scene", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--width", type=int, default=504)
    parser.add_argument("--minutes", type=float, default=8.0, help="training of gnt")
    parser.add_argument("--tune-minutes", type=float, default=4.0, help="fine-tuning of converted rows")
    parser.add_argument("--rows", nargs="+", default=list(ALL), choices=ALL)
    parser.add_argument("--rays", type=int, default=2048)
    parser.add_argument("--samples", type=int, default=64, help="points along a ray in training")
    parser.add_argument("--render-samples", type=int, default=None, help="points along a ray when rendering, if not as trained")
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--tune-lr", type=float, default=2e-4)
    parser.add_argument("--precision", default="bf16", choices=("fp32", "bf16"))
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def dense_start(arguments: argparse.Namespace) -> GNT:
    """The trained GNT that converted rows start from, without dropout as it is fine-tuned briefly."""
    return load_any(arguments.output / "gnt" / "model.safetensors")


def make_model(row: str, scene: Scene, arguments: argparse.Namespace) -> torch.nn.Module:
    torch.manual_seed(arguments.seed)
    if row in FLOORS:
        # The floor's planes follow the picture's width, as in the floor table.
        return Nearest() if row == "nearest" else Sweep(planes=96 if scene.width >= 504 else 64)
    if row == "nerf":
        return NeRF(NeRFConfig(ndc=inspect_scene(scene).forward_facing)).fit(scene)
    if row == "gnt":
        return GNT(GNTConfig(depth=arguments.depth, samples=arguments.samples, dropout=0.0))
    return dense_start(arguments) if row == "gnt-longer" else reparameterize(dense_start(arguments), row)


def train_row(row: str, model: torch.nn.Module, scene: Scene, arguments: argparse.Namespace) -> dict:
    minutes = {"nerf": arguments.minutes + arguments.tune_minutes, "gnt": arguments.minutes}.get(row, arguments.tune_minutes)
    lr = arguments.lr if row in ("nerf", "gnt") else arguments.tune_lr
    config = NvsTrainConfig(
        steps=1_000_000, minutes=minutes, rays=arguments.rays, lr=lr, lr_features=2 * lr, precision=arguments.precision if row != "nerf" else "fp32",
        compile=arguments.compile, source_jitter=0 if arguments.compile else 2, seed=arguments.seed, check_every=500,
    )  # fmt: skip
    folder = arguments.output / row
    result = train(model, [scene], folder, config, arguments.device, resume=(folder / "run.json").exists())
    before = 0.0 if row in ("nerf", "gnt") else arguments.minutes
    return {"minutes": minutes, "minutes_before": before, "steps": result.steps, "lr": lr, "rays": arguments.rays, "samples": model.samples}


def main() -> None:
    arguments = parse()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    scene = load_scene(arguments.scene, arguments.width)
    for row in arguments.rows:
        done = arguments.output / f"{row}.json"
        if done.exists():
            print(f"{row}: done before, {json.loads(done.read_text())['psnr']:.2f} dB")
            continue
        start = time.monotonic()
        model = make_model(row, scene, arguments)
        budget = train_row(row, model, scene, arguments) if row not in FLOORS else None
        if arguments.render_samples is not None and row not in (*FLOORS, "nerf"):
            model.samples = arguments.render_samples
        renderer = make_renderer(model, scene, arguments.device, arguments.precision if row not in (*FLOORS, "nerf") else "fp32")
        near, far = (bound / scene.unit for bound in scene.depth_range)

        def keep(view: int, picture, _score, row=row, near=near, far=far) -> None:
            if view == scene.test[0]:
                write_png(arguments.output / f"{row}.png", error_picture(picture.rgb, scene.images[view].float() / 255))
                write_png(arguments.output / f"{row}-depth.png", depth_picture(picture.depth, near, far))

        score = evaluate(renderer, seen=keep)
        print(score_table(score), flush=True)
        facts = conditions(arguments.device, seed=arguments.seed, precision=arguments.precision)
        more = {"budget": budget, "seconds_in_all": time.monotonic() - start, "conditions": facts}
        write_json(done, stamped("nvs-evaluate", {"row": row} | score.to_dict() | more))


if __name__ == "__main__":
    main()
