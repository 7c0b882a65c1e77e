"""What a model is asked and what it may look at: rays, and the source views with their features."""

from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from .cameras import nearest_views, pixel_grid, pixel_rays
from .scene import Camera, Scene


class Rays(NamedTuple):
    """Rays of one target view. A direction has length 1 along the optical axis."""

    origin: Float[Tensor, "R 3"]
    direction: Float[Tensor, "R 3"]
    pixel: Float[Tensor, "R 2"]
    """(x, y) in the target picture."""
    near: float
    """Depth of the first sample."""
    far: float
    """Depth of the last sample."""

    def chunk(self, start: int, count: int) -> "Rays":
        """Rays start … start + count."""
        part = slice(start, start + count)
        return Rays(self.origin[part], self.direction[part], self.pixel[part], self.near, self.far)


class RayColors(NamedTuple):
    """A model's answer."""

    rgb: Float[Tensor, "R 3"]
    """In [0, 1] up to the model's error; not clamped."""
    depth: Float[Tensor, "R"]
    """Along the optical axis, in the world's units."""
    coarse: Float[Tensor, "R 3"] | None = None
    """The colour of a first, coarse pass, for its loss."""


class Sources(NamedTuple):
    """The source views that one target view looks at, in any order."""

    images: Float[Tensor, "V 3 H W"]
    """RGB in [0, 1]."""
    intrinsics: Float[Tensor, "V 3 3"]
    poses: Float[Tensor, "V 4 4"]
    features: Float[Tensor, "V C h w"] | None
    """Of the feature net, at a quarter of the resolution; None for models without one."""


class ViewModel(Protocol):
    """What the training loop, the renderer and the metrics know about a model."""

    sources: int
    """How many source views it looks at; 0 for none."""
    samples: int
    """Points along a ray."""

    def encode(self, images: Float[Tensor, "V 3 H W"]) -> Float[Tensor, "V C h w"] | None: ...

    def bytes_per_ray(self, training: bool) -> int: ...

    def __call__(self, rays: Rays, sources: Sources | None) -> RayColors: ...


def camera_rays(camera: Camera, near: float, far: float, device: torch.device | str = "cpu") -> Rays:
    """The rays of every pixel of a view, in reading order."""
    pixels = pixel_grid(camera.height, camera.width, device)
    origin, direction = pixel_rays(pixels, camera.intrinsics.to(pixels), camera.pose.to(pixels))
    return Rays(origin, direction, pixels, near, far)


@dataclass(frozen=True)
class SourceBank:
    """Some views of a scene on the device, with their features, made once and used for every target view."""

    views: tuple[int, ...]
    """Indices in the scene."""
    images: Float[Tensor, "V 3 H W"]
    intrinsics: Float[Tensor, "V 3 3"]
    poses: Float[Tensor, "V 4 4"]
    places: Float[Tensor, "V 4 4"]
    """The poses again, on the CPU, so that choosing views never waits for the device."""
    features: Float[Tensor, "V C h w"] | None = None

    def select(self, places: list[int]) -> Sources:
        """The sources at these places of `views`."""
        chosen = torch.tensor(places, device=self.images.device)
        features = None if self.features is None else self.features[chosen]
        return Sources(self.images[chosen], self.intrinsics[chosen], self.poses[chosen], features)

    def order(self, pose: Float[Tensor, "4 4"], without: int | None = None) -> list[int]:
        """Places from the nearest view to the farthest, leaving out scene view `without`."""
        places = nearest_views(pose.to(self.places), self.places).tolist()
        return [place for place in places if self.views[place] != without]


def make_bank(scene: Scene, views: tuple[int, ...], device: torch.device | str) -> SourceBank:
    """The views on the device as float32, without features."""
    chosen = list(views)
    images = scene.images[chosen].to(device).permute(0, 3, 1, 2).float().div_(255).contiguous()
    poses = scene.poses[chosen]
    return SourceBank(views, images, scene.intrinsics[chosen].float().to(device), poses.float().to(device), poses.cpu())


@torch.no_grad()
def encode_bank(bank: SourceBank, model: ViewModel) -> SourceBank:
    """The bank with the model's features of every view, one view at a time so that the size of the bank costs no memory."""
    features = [model.encode(image[None]) for image in bank.images]
    if features[0] is None:
        return bank
    return replace(bank, features=torch.cat(features))
