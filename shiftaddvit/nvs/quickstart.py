"""The whole path on a small embedded scene: a floor, a small GNT, its conversion, and a strip of pictures."""

import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from shiftaddvit.reparam import reparameterize

from .evaluate import SceneScore, evaluate
from .floors import Nearest
from .gnt import GNT, GNTConfig
from .load import load_scene
from .pictures import write_png
from .render import Picture, make_renderer
from .scene import Scene
from .train import NvsTrainConfig, train
from .video import depth_picture

SMALL = GNTConfig(width=32, depth=2, samples=32, sources=5, feature_channels=16, feature_base=8, dropout=0.0)
"""A GNT that two CPU cores can train in two minutes; not the published size."""


@dataclass(frozen=True)
class QuickstartResult:
    """What the strip shows, in numbers."""

    scores: dict[str, SceneScore]
    """By row: `nearest`, `gnt`, the converted row."""
    seconds: float
    """For everything."""
    strip: Path
    """The picture."""


def embedded_scene(width: int = 126) -> Scene:
    """The still life that ships with the package, path-traced by `assets/nvs_scene/render_scene.py`: 24 views, every 8th held out."""
    return load_scene(_folder(), width=width)


def embedded_depth(scene: Scene, view: int) -> Float[Tensor, "94 126"]:
    """The exact depth of a view of `embedded_scene`, at 126×94, in the units of the scene file."""
    name = Path(scene.names[view]).stem
    values = np.asarray(Image.open(_folder() / "depth" / f"{name}.png"), dtype=np.float64)
    return torch.from_numpy(65535 / values)  # 65535 · 1 / depth


def _folder() -> Path:
    return Path(str(resources.files("shiftaddvit") / "assets" / "nvs_scene"))


def quickstart(
    output: Path,
    row: str = "gnt-add-shift-moe",
    train_minutes: float = 1.4,
    tune_minutes: float = 0.4,
    device: torch.device | str = "cpu",
    say: Callable[[str], None] = print,
) -> QuickstartResult:
    """Train a small GNT on the embedded scene, convert it with the recipe `row`, fine-tune, score all on the held-out views, and write
    `strip.png`, both models and their logs to `output`."""
    start = time.monotonic()
    scene = embedded_scene()
    scores: dict[str, SceneScore] = {}
    shown: dict[str, Picture] = {}

    def score(name: str, model: nn.Module) -> None:
        renderer = make_renderer(model, scene, device)
        scores[name] = evaluate(renderer, seen=lambda view, picture, _: shown.setdefault(name, picture))
        found = scores[name]
        say(f"{name}: {found.psnr:.2f} dB, SSIM {found.ssim:.3f}, {found.seconds:.1f} s an image")

    score("nearest", Nearest())
    torch.manual_seed(0)
    dense = GNT(SMALL)
    say(f"training a small GNT for {train_minutes:g} min")
    train(dense, [scene], output / "gnt", _config(train_minutes, 5e-3), device, overwrite=True)
    score("gnt", dense)
    if scores["gnt"].psnr <= scores["nearest"].psnr:
        say("the small GNT is not above the floor 'nearest': this machine is slow or busy; give it --train-minutes 5")
    converted = reparameterize(deepcopy(dense), row)
    say(f"converted with the recipe {row}; fine-tuning for {tune_minutes:g} min")
    train(converted, [scene], output / row, _config(tune_minutes, 1e-3), device, overwrite=True)
    score(row, converted)
    strip = output / "strip.png"
    write_png(strip, picture_strip(scene, scene.test[0], shown))
    return QuickstartResult(scores, time.monotonic() - start, strip)


def _config(minutes: float, lr: float) -> NvsTrainConfig:
    return NvsTrainConfig(steps=100_000, minutes=minutes, rays=96, lr=lr, lr_features=lr, warmup_steps=20, source_jitter=1, check_every=150)


def picture_strip(scene: Scene, view: int, shown: dict[str, Picture]) -> Float[Tensor, "2H W 3"]:
    """The truth and every row's picture; below, every row's depth."""
    truth = scene.images[view].float() / 255
    near, far = (bound / scene.unit for bound in scene.depth_range)
    top = [truth, *(picture.rgb for picture in shown.values())]
    bottom = [torch.ones_like(truth), *(depth_picture(picture.depth, near, far) for picture in shown.values())]
    return torch.cat([torch.cat(top, dim=1), torch.cat(bottom, dim=1)], dim=0)
