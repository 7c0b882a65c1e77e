"""The NeRF baseline: a coarse and a fine MLP, in normalised device coordinates for forward-facing scenes."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from shiftaddvit.errors import UserError

from .gnt.transformer import encode_position
from .projector import jittered, sample_depths
from .scene import Scene
from .sources import RayColors, Rays, Sources


@dataclass(frozen=True)
class NeRFConfig:
    """The shape of a NeRF. The defaults are the published ones for LLFF scenes."""

    width: int = 256
    """Hidden units of each of the eight layers."""
    samples: int = 64
    """Points of the coarse pass, uniform along the ray."""
    fine_samples: int = 64
    """Points of the fine pass, drawn where the coarse one found matter; evaluated together with the coarse points."""
    noise: float = 1.0
    """Standard deviation of the noise on densities, in training only."""
    ndc: bool = True
    """Normalised device coordinates: for forward-facing scenes only. Otherwise points are uniform in inverse depth."""

    def __post_init__(self) -> None:
        for field in ("width", "samples", "fine_samples"):
            value = getattr(self, field)
            if not isinstance(value, int) or value < 2:
                raise UserError(f"NeRF {field} = {value!r}; allowed: a whole number of 2 or more")


class NeRFMLP(nn.Module):
    """Eight layers with a skip into the fifth; density from the position alone, colour with the direction. 595,844 parameters."""

    def __init__(self, width: int = 256):
        super().__init__()
        inputs = [63, *[width] * 4, width + 63, *[width] * 2]
        self.pts_linears = nn.ModuleList(nn.Linear(size, width) for size in inputs)
        self.views_linears = nn.ModuleList([nn.Linear(width + 27, width // 2)])
        self.feature_linear, self.alpha_linear = nn.Linear(width, width), nn.Linear(width, 1)
        self.rgb_linear = nn.Linear(width // 2, 3)

    def forward(
        self, points: Float[Tensor, "*n 3"], direction: Float[Tensor, "*n 3"]
    ) -> tuple[Float[Tensor, "*n 3"], Float[Tensor, "*n"]]:
        """Colour in [0, 1] and raw density of points seen from unit directions."""
        place, heading = encode_position(points, 10), encode_position(direction, 4)
        h = place
        for number, layer in enumerate(self.pts_linears):
            h = F.relu(layer(torch.cat([place, h], dim=-1) if number == 5 else h))
        density = self.alpha_linear(h)[..., 0]
        h = torch.cat([self.feature_linear(h), heading.to(h.dtype)], dim=-1)
        return torch.sigmoid(self.rgb_linear(F.relu(self.views_linears[0](h))).float()), density.float()


class NeRF(nn.Module):
    """Coarse and fine MLP. Looks at no source views; knows one scene, whose projection it keeps in `frustum`."""

    sources = 0

    def __init__(self, config: NeRFConfig = NeRFConfig()):
        super().__init__()
        self.config, self.samples = config, config.samples
        self.coarse, self.fine = NeRFMLP(config.width), NeRFMLP(config.width)
        # 2 fx / W and 2 fy / H of the scene, for normalised device coordinates.
        self.register_buffer("frustum", torch.ones(2))

    def fit(self, scene: Scene) -> "NeRF":
        """Take over the projection of a normalised scene."""
        focal = scene.intrinsics.mean(dim=0)
        self.frustum.copy_(torch.tensor([2 * focal[0, 0] / scene.width, 2 * focal[1, 1] / scene.height]))
        return self

    def encode(self, images: Float[Tensor, "V 3 H W"]) -> None:
        return None

    def bytes_per_ray(self, training: bool) -> int:
        """About how much memory one ray takes in float32."""
        points = 2 * self.config.samples + self.config.fine_samples
        return points * self.config.width * 4 * (12 if training else 3)

    def forward(self, rays: Rays, sources: Sources | None = None) -> RayColors:
        """Colours of the fine and the coarse pass, depth of the fine one."""
        count, device = len(rays.origin), rays.origin.device
        if self.config.ndc:
            origin, direction = ndc_rays(rays.origin, rays.direction, self.frustum)
            t = jittered(torch.linspace(0, 1, self.config.samples, device=device), count, self.training)
        else:
            origin, direction = rays.origin, rays.direction
            t = sample_depths(count, self.config.samples, rays.near, rays.far, self.training, device)
        heading = F.normalize(rays.direction, dim=-1)
        coarse, weights = self._march(self.coarse, origin, direction, heading, t)
        between = 0.5 * (t[:, 1:] + t[:, :-1])
        extra = draw(between, weights[:, 1:-1].detach(), self.config.fine_samples, self.training)
        t = torch.cat([t, extra], dim=-1).sort(dim=-1).values
        rgb, weights = self._march(self.fine, origin, direction, heading, t)
        return RayColors(rgb, (weights * self._depth(t, rays)).sum(dim=-1), coarse)

    def _march(
        self, mlp: NeRFMLP, origin: Tensor, direction: Tensor, heading: Tensor, t: Float[Tensor, "R S"]
    ) -> tuple[Float[Tensor, "R 3"], Float[Tensor, "R S"]]:
        """Volume rendering (NeRF, equation 3)."""
        points = origin[:, None] + t[..., None] * direction[:, None]
        color, density = mlp(points, heading[:, None].expand_as(points))
        if self.training and self.config.noise > 0:
            density = density + torch.randn_like(density) * self.config.noise
        step = torch.cat([t[:, 1:] - t[:, :-1], torch.full_like(t[:, :1], 1e10)], dim=-1) * direction.norm(dim=-1, keepdim=True)
        absorbed = F.relu(density) * step
        before = torch.cat([torch.zeros_like(absorbed[:, :1]), absorbed[:, :-1]], dim=-1).cumsum(dim=-1)
        weights = (1 - torch.exp(-absorbed)) * torch.exp(-before)  # sums: the gradient of a product of factors waits for the device
        return (weights.unsqueeze(-1) * color).sum(dim=1), weights

    def _depth(self, t: Float[Tensor, "R S"], rays: Rays) -> Float[Tensor, "R S"]:
        """Depth along the target's optical axis of the points at t."""
        if not self.config.ndc:
            return t
        z = -1 / (1 - t.clamp_max(1 - 1 / rays.far))  # along the mean camera's axis; the near plane is z = −1
        return (z - rays.origin[:, 2:]) / rays.direction[:, 2:]


def ndc_rays(
    origin: Float[Tensor, "R 3"], direction: Float[Tensor, "R 3"], frustum: Float[Tensor, "2"]
) -> tuple[Float[Tensor, "R 3"], Float[Tensor, "R 3"]]:
    """Rays in normalised device coordinates of a camera at the world's origin looking along −z, with the near plane at z = −1
    (NeRF, appendix C): t = 0 is the near plane, t = 1 infinity."""
    t = -(1 + origin[:, 2]) / direction[:, 2]
    origin = origin + t[:, None] * direction
    slope, heading = origin[:, :2] / -origin[:, 2:], direction[:, :2] / -direction[:, 2:]
    start = torch.cat([frustum * slope, 1 + 2 / origin[:, 2:]], dim=-1)
    along = torch.cat([frustum * (heading - slope), -2 / origin[:, 2:]], dim=-1)
    return start, along


def draw(
    edges: Float[Tensor, "R B"], weights: Float[Tensor, "R W"], count: int, random: bool
) -> Float[Tensor, "R count"]:
    """Samples from the piecewise constant density with `weights` between `edges` (B = W + 1), by inverting its distribution."""
    probability = (weights + 1e-5) / (weights + 1e-5).sum(dim=-1, keepdim=True)
    cumulative = torch.cat([torch.zeros_like(probability[:, :1]), probability.cumsum(dim=-1)], dim=-1)
    if random:
        u = torch.rand(len(edges), count, device=edges.device)
    else:
        u = torch.linspace(0, 1, count, device=edges.device).expand(len(edges), count).contiguous()
    above = torch.searchsorted(cumulative, u, right=True).clamp(1, edges.shape[-1] - 1)
    low, high = cumulative.gather(-1, above - 1), cumulative.gather(-1, above)
    share = (u - low) / torch.where(high - low < 1e-5, 1.0, high - low)
    start, end = edges.gather(-1, above - 1), edges.gather(-1, above)
    return start + share.clamp(0, 1) * (end - start)
