"""Measuring rendered held-out views against the truth."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from shiftaddvit.errors import UserError

from .metrics import Lpips, psnr, ssim
from .render import Picture, Renderer


@dataclass(frozen=True)
class ViewScore:
    """One held-out view."""

    name: str
    """Of the picture."""
    psnr: float
    """dB."""
    ssim: float
    """11×11 Gaussian."""
    lpips: float | None
    """VGG; None where it was not computed."""
    seconds: float
    """To render it."""


@dataclass(frozen=True)
class SceneScore:
    """A scene's held-out views and their means."""

    scene: str
    """Its name."""
    width: int
    """Of the pictures, in pixels."""
    height: int
    """Of the pictures, in pixels."""
    views: tuple[ViewScore, ...]
    """In the order of the scene."""

    @property
    def psnr(self) -> float:
        """Mean of the views' PSNR (not the PSNR of the mean error)."""
        return sum(view.psnr for view in self.views) / len(self.views)

    @property
    def ssim(self) -> float:
        return sum(view.ssim for view in self.views) / len(self.views)

    @property
    def lpips(self) -> float | None:
        """None unless every view has one: never a number that was not computed."""
        found = [view.lpips for view in self.views]
        return None if None in found else sum(found) / len(found)

    @property
    def seconds(self) -> float:
        """Median seconds an image."""
        return float(torch.tensor([view.seconds for view in self.views]).median())

    def to_dict(self) -> dict[str, object]:
        """Plain JSON values."""
        means = {"psnr": self.psnr, "ssim": self.ssim, "lpips": self.lpips, "seconds_per_image": self.seconds}
        views = [vars(view) for view in self.views]
        return {"scene": self.scene, "width": self.width, "height": self.height, **means, "views": views}


def evaluate(
    renderer: Renderer,
    lpips: Lpips | None = None,
    seen: Callable[[int, Picture, ViewScore], None] = lambda index, picture, score: None,
) -> SceneScore:
    """Render every held-out view and score it; `seen(view index, picture, score)` is called after each.

    An error while rendering ends the evaluation: a mean over the views that happened to work would be a lie.
    """
    scene = renderer.scene
    if not scene.test:
        raise UserError(f"scene {scene.name!r} holds out no view, so there is nothing to measure; load it with a hold-out step (8 is usual)")
    scores = []
    for index in scene.test:
        picture = renderer.render(scene.camera(index))
        truth = scene.images[index].float() / 255
        perceived = lpips(picture.rgb, truth) if lpips is not None else None
        scores.append(ViewScore(scene.names[index], psnr(picture.rgb, truth), ssim(picture.rgb, truth), perceived, picture.seconds))
        seen(index, picture, scores[-1])
    return SceneScore(scene.name, scene.width, scene.height, tuple(scores))
