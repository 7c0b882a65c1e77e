"""Floors: two ways to make a new view that learn nothing. A trained model that is not above them has learnt nothing either."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .projector import look_up, sample_depths
from .sources import RayColors, Rays, Sources


class Nearest(nn.Module):
    """Copies the nearest source view, pixel for pixel. Its depth is the middle of the range in inverse depth."""

    sources = 1
    samples = 1

    def encode(self, images: Float[Tensor, "V 3 H W"]) -> None:
        return None

    def forward(self, rays: Rays, sources: Sources) -> RayColors:
        height, width = sources.images.shape[-2:]
        x = rays.pixel[:, 0].round().long().clamp(0, width - 1)
        y = rays.pixel[:, 1].round().long().clamp(0, height - 1)
        middle = 2 / (1 / rays.near + 1 / rays.far)
        return RayColors(sources.images[0, :, y, x].T, torch.full_like(rays.pixel[:, 0], middle))


class Sweep(nn.Module):
    """Plane sweep: on planes uniform in inverse depth, the source colours are averaged; a pixel mixes the planes by a soft minimum of
    the sources' colour deviation."""

    def __init__(self, planes: int = 64, sources: int = 10, temperature: float = 0.01):
        super().__init__()
        self.samples, self.sources, self.temperature = planes, sources, temperature

    def encode(self, images: Float[Tensor, "V 3 H W"]) -> None:
        return None

    def forward(self, rays: Rays, sources: Sources) -> RayColors:
        depths = sample_depths(len(rays.origin), self.samples, rays.near, rays.far, False, rays.origin.device)
        points = rays.origin[:, None] + depths[..., None] * rays.direction[:, None]
        seen = look_up(points, rays.origin, sources)
        count = seen.mask.sum(dim=2)
        mean = (seen.values * seen.mask).sum(dim=2) / count.clamp_min(1)  # (R, S, 3)
        square = ((seen.values - mean.unsqueeze(2)) ** 2 * seen.mask).sum(dim=2) / count.clamp_min(1)
        deviation = square.mean(dim=-1).sqrt()
        # A plane that fewer than two views see has no deviation to speak of: worst, but finite.
        deviation = torch.where(count[..., 0] < 2, 1.0, deviation)
        weights = torch.softmax(-deviation / self.temperature, dim=-1)
        return RayColors((weights.unsqueeze(-1) * mean).sum(dim=1), (weights * depths).sum(dim=-1))
