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

    On each plane the sources' colours are averaged, near cameras counting more (1/distance²); a pixel mixes the planes by a soft minimum of
    the sources' deviation from each other over 18 neighbouring pixels.
    """

    reach = (2, 4)  # pixels from the centre to the neighbours that are compared

    def __init__(self, planes: int = 64, sources: int = 10, temperature: float = 0.003):
        super().__init__()
        self.samples, self.sources, self.temperature = planes, sources, temperature

    def encode(self, images: Float[Tensor, "V 3 H W"]) -> Float[Tensor, "V 54 H W"]:
        """The colours of the neighbours of every pixel."""
        height, width = images.shape[-2:]
        border = max(self.reach)
        padded = F.pad(images, (border,) * 4, mode="replicate")
        shifts = [(y, x) for step in self.reach for y in (-step, 0, step) for x in (-step, 0, step)]
        return torch.cat([padded[:, :, border + y :, border + x :][:, :, :height, :width] for y, x in shifts], dim=1)

    def bytes_per_ray(self, training: bool) -> int:
        return self.samples * self.sources * 57 * 12

    def forward(self, rays: Rays, sources: Sources) -> RayColors:
        near, far = rays.near / NEAR_MARGIN, rays.far / FAR_MARGIN
        depths = sample_depths(len(rays.origin), self.samples, near, far, False, rays.origin.device)
        points = rays.origin[:, None] + depths[..., None] * rays.direction[:, None]
        seen = look_up(points, rays.origin, sources)
        distance = (sources.poses[:, :3, 3] - rays.origin[:, None]).norm(dim=-1)  # (R, V)
        share = seen.mask * (distance.square() + 1e-8).reciprocal()[:, None, :, None]
        share = share / share.sum(dim=2, keepdim=True).clamp_min(1e-12)
        mean = (seen.values * share).sum(dim=2)
        spread = ((seen.values - mean.unsqueeze(2)).square() * share).sum(dim=2)
        deviation = spread[..., 3:].mean(dim=-1).sqrt()
        # A plane that fewer than two views see has no deviation to speak of: worst, but finite.
        deviation = torch.where(seen.mask.sum(dim=2)[..., 0] < 2, 1.0, deviation)
        weights = torch.softmax(-deviation / self.temperature, dim=-1)
        return RayColors((weights.unsqueeze(-1) * mean[..., :3]).sum(dim=1), (weights * depths).sum(dim=-1))
