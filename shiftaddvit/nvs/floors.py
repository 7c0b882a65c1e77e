"""Floors: two ways to make a new view that learn nothing. A trained model that is not above them has learnt nothing either."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from .projector import look_up, sample_depths
from .scene import FAR_MARGIN, NEAR_MARGIN
from .sources import RayColors, Rays, Sources


class Nearest(nn.Module):
    """Copies the nearest source view, pixel for pixel. Its depth is the middle of the range in inverse depth."""

    sources = 1
    samples = 1

    def encode(self, images: Float[Tensor, "V 3 H W"]) -> None:
        return None

    def bytes_per_ray(self, training: bool) -> int:
        return 64

    def forward(self, rays: Rays, sources: Sources) -> RayColors:
        height, width = sources.images.shape[-2:]
        x = rays.pixel[:, 0].round().long().clamp(0, width - 1)
        y = rays.pixel[:, 1].round().long().clamp(0, height - 1)
        nearest = (sources.poses[:, :3, 3] - rays.origin[0]).norm(dim=-1).argmin()
        middle = 2 / (1 / rays.near + 1 / rays.far)
        return RayColors(sources.images[nearest, :, y, x].T, torch.full_like(rays.pixel[:, 0], middle))


class Sweep(nn.Module):
    """Plane sweep on planes uniform in inverse depth between the scene's bounds.

    On each plane the sources' colours are averaged, the n-th nearest camera counting 1/n; a pixel mixes the planes by a soft minimum of
    the sources' deviation from each other over nine neighbouring pixels. 64 planes for pictures 252 wide, 96 for 504.
    """

    reach = 2  # pixels from the centre to the neighbours that are compared

    def __init__(self, planes: int = 64, sources: int = 10, temperature: float = 0.003):
        super().__init__()
        self.samples, self.sources, self.temperature = planes, sources, temperature

    def encode(self, images: Float[Tensor, "V 3 H W"]) -> Float[Tensor, "V 27 H W"]:
        """The colours of the neighbours of every pixel."""
        height, width = images.shape[-2:]
        padded = F.pad(images, (self.reach,) * 4, mode="replicate")
        steps = (0, self.reach, 2 * self.reach)
        return torch.cat([padded[:, :, y : y + height, x : x + width] for y in steps for x in steps], dim=1)

    def bytes_per_ray(self, training: bool) -> int:
        return self.samples * self.sources * 30 * 12

    def forward(self, rays: Rays, sources: Sources) -> RayColors:
        near, far = rays.near / NEAR_MARGIN, rays.far / FAR_MARGIN
        depths = sample_depths(len(rays.origin), self.samples, near, far, False, rays.origin.device)
        points = rays.origin[:, None] + depths[..., None] * rays.direction[:, None]
        seen = look_up(points, rays.origin, sources)
        distance = (sources.poses[:, :3, 3] - rays.origin[:, None]).norm(dim=-1)  # (R, V)
        rank = distance.argsort(dim=-1).argsort(dim=-1) + 1
        color = _mean(seen.values[..., :3], seen.mask / rank[:, None, :, None])
        around = seen.values[..., 3:]
        deviation = _mean((around - _mean(around, seen.mask).unsqueeze(2)).square(), seen.mask).mean(dim=-1).sqrt()
        # A plane that fewer than two views see has no deviation to speak of: worst, but finite.
        deviation = torch.where(seen.mask.sum(dim=2)[..., 0] < 2, 1.0, deviation)
        weights = torch.softmax(-deviation / self.temperature, dim=-1)
        return RayColors((weights.unsqueeze(-1) * color).sum(dim=1), (weights * depths).sum(dim=-1))


def _mean(values: Float[Tensor, "R S V C"], share: Float[Tensor, "R S V 1"]) -> Float[Tensor, "R S C"]:
    """Over the views, weighted; zero where no view has a share."""
    return (values * share).sum(dim=2) / share.sum(dim=2).clamp_min(1e-6)
