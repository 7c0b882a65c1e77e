"""GNT as a view model: feature net, projector, transformer."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from shiftaddvit.errors import UserError

from ..projector import look_up, sample_depths
from ..sources import RayColors, Rays, Sources
from .feature_net import ResUNet
from .transformer import GNTTransformer


@dataclass(frozen=True)
class GNTConfig:
    """The shape of a GNT. The defaults are the published single-scene model."""

    width: int = 64
    """Channels of the transformer; a multiple of 8 and of `heads`."""
    depth: int = 4
    """Pairs of a view and a ray transformer: 4 for one scene, 8 published for any scene."""
    heads: int = 4
    """Heads of the ray transformer."""
    samples: int = 192
    """Points along a ray; 64 for quick runs. May differ between training and rendering."""
    sources: int = 10
    """Source views that a target view looks at."""
    feature_channels: int = 32
    """Channels of the feature net's output."""
    feature_base: int = 64
    """Width of the feature net's first stage."""
    dropout: float = 0.1
    """In training, on attention and feed-forward outputs."""

    def __post_init__(self) -> None:
        for field in ("width", "depth", "heads", "samples", "sources", "feature_channels", "feature_base"):
            value = getattr(self, field)
            if not isinstance(value, int) or value < 1:
                raise UserError(f"GNT {field} = {value!r}; allowed: a positive whole number")
        if self.width % 8 or self.width % self.heads:
            raise UserError(f"GNT width = {self.width}; allowed: a multiple of 8 and of heads = {self.heads}")
        if self.samples < 2:
            raise UserError(f"GNT samples = {self.samples}; allowed: 2 and more")
        if not 0 <= self.dropout < 1:
            raise UserError(f"GNT dropout = {self.dropout}; allowed: 0 ≤ dropout < 1")


class GNT(nn.Module):
    """The published pair of networks under their published names: `feature_net` and `net_coarse`."""

    def __init__(self, config: GNTConfig = GNTConfig()):
        super().__init__()
        self.config = config
        self.samples, self.sources = config.samples, config.sources
        self.feature_net = ResUNet(config.feature_channels, config.feature_base)
        self.net_coarse = GNTTransformer(config.width, config.depth, 3 + config.feature_channels, config.heads, config.dropout)

    def encode(self, images: Float[Tensor, "V 3 H W"]) -> Float[Tensor, "V C h w"]:
        return self.feature_net(images)

    def bytes_per_ray(self, training: bool) -> int:
        """About how much memory one ray takes in float32: each view of each sample holds some ten vectors a block."""
        blocks = self.config.depth if training else 1
        seen = 12 * (3 + self.config.feature_channels) + 40 * self.config.width * blocks
        return self.samples * (self.sources * seen + 80 * self.config.width * blocks)

    def forward(self, rays: Rays, sources: Sources) -> RayColors:
        """Colours and depths; the order of the source views does not matter. Samples are jittered in training."""
        depths = sample_depths(len(rays.origin), self.samples, rays.near, rays.far, self.training, rays.origin.device)
        points = rays.origin[:, None] + depths[..., None] * rays.direction[:, None]
        seen = look_up(points, rays.origin, sources)
        rgb, weights = self.net_coarse(seen, points, rays.direction)
        return RayColors(rgb.float(), (weights.float() * depths).sum(dim=-1))
