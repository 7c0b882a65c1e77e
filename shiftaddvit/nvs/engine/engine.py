"""A deployed GNT: it answers `(rays, sources)` like the model, from prepared weights, and on a GPU by replaying a CUDA graph."""

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shiftaddvit.engine.program import Launch
from shiftaddvit.ops.backends import Backend

from ..cameras import invert_pose
from ..gnt import GNT
from ..projector import sample_depths
from ..sources import RayColors, Rays, Sources
from .fold import padded
from .lower import lower_gnt
from .program import RayProgram
from .steps import Target

RAYS = 2048
"""Rays of a chunk: enough to fill a large GPU many times over, small enough that the picture's last chunk wastes little."""


@dataclass
class Captured:
    """One shape of question recorded as a CUDA graph."""

    graph: torch.cuda.CUDAGraph
    """Replays the whole program."""
    target: Target
    """Where it reads."""
    rgb: Tensor
    """Where it writes."""
    depth: Tensor
    """Likewise."""
    views: tuple[Tensor, ...] = ()
    """What was last copied into the part of `target` that is about the views."""


class RayEngine(nn.Module):
    """A `ViewModel` for rendering alone. Make it with `deploy_gnt`; weights are copies, so the model may change or go."""

    def __init__(self, model: GNT, program: RayProgram, launch: Launch):
        super().__init__()
        self.feature_net = model.feature_net
        self.samples, self.sources, self.config = model.samples, model.sources, model.config
        self.program, self.launch = program, launch
        self._sources: Sources | None = None
        self._views: tuple[Tensor, ...] = ()
        self._captured: dict[tuple, Captured] = {}

    def encode(self, images: Tensor) -> Tensor:
        return self.feature_net(images)

    def bytes_per_ray(self, training: bool) -> int:
        """What views see is kept once, in the program's dtype; a handful of tokens beside it."""
        size, width = self.program.dtype.itemsize, self.config.width
        return self.samples * size * (self.sources * (width + 8) + 12 * width)

    @torch.no_grad()
    def forward(self, rays: Rays, sources: Sources) -> RayColors:
        """Colours and depths. The same number of rays each time replays one graph."""
        device = rays.origin.device
        with torch.autocast(device.type, enabled=False), torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            return self._answer(rays, sources)

    def _answer(self, rays: Rays, sources: Sources) -> RayColors:
        if sources is not self._sources:
            self._sources, self._views = sources, self.prepare(sources)
        depths = sample_depths(1, self.samples, rays.near, rays.far, False, rays.origin.device)[0].contiguous()
        target = Target(rays.origin.float(), rays.direction.float(), depths, *self._views)
        if not rays.origin.is_cuda:
            return RayColors(*self.program.run(target, self.launch))
        key = tuple(tuple(part.shape) for part in target)
        captured = self._captured.get(key)
        if captured is None:
            captured = self._captured[key] = self._capture(target)
        # The views are large and the same for every chunk of a picture.
        changed = len(target) if captured.views is not self._views else 3
        for place, part in zip(captured.target[:changed], target[:changed], strict=True):
            place.copy_(part)
        captured.views = self._views
        captured.graph.replay()
        return RayColors(captured.rgb.clone(), captured.depth.clone())

    def prepare(self, sources: Sources) -> tuple[Tensor, ...]:
        """Cameras as one matrix a view; pictures and features channels last, in the program's dtype, padded."""
        dtype = self.program.dtype
        project = sources.intrinsics.double() @ invert_pose(sources.poses.double())[:, :3]
        images = padded(sources.images.permute(0, 2, 3, 1).to(dtype), *sources.images.shape[:1], *sources.images.shape[2:], 4)
        features = sources.features.permute(0, 2, 3, 1).to(dtype)
        features = padded(features, *features.shape[:3], self.program.feature_channels)
        return project.float().contiguous(), sources.poses[:, :3, 3].float().contiguous(), images.contiguous(), features.contiguous()

    def _capture(self, target: Target) -> Captured:
        held = Target(*(part.clone() for part in target))
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # Compiles kernels and fills library caches, which a capture may not do; runs out of memory here rather than there.
            for _ in range(2):
                self.program.run(held, self.launch)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.empty_cache()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            rgb, depth = self.program.run(held, self.launch)
        return Captured(graph, held, rgb, depth)


def deploy_gnt(model: GNT, dtype: torch.dtype = torch.bfloat16, device: torch.device | str | None = None, backend: Backend = "auto") -> RayEngine:
    """The engine of a GNT, dense or converted by any recipe. `dtype` is that of matrix products and of what is kept between kernels;
    geometry, norms, softmax and colours are float32. UserError for a model that has no fused form, naming why."""
    program = lower_gnt(model, dtype, device)
    return RayEngine(model, program, Launch(backend)).eval()
