"""Pictures from a view model: in chunks that fit the device, features of the source views made once."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from shiftaddvit.errors import UserError, unknown

from .engine import deploy_gnt
from .engine.engine import RAYS
from .engine.lower import why_not
from .floors import Nearest, Sweep
from .memory import Chunk, first_chunk
from .scene import Camera, Scene, check_sources
from .sources import Rays, SourceBank, Sources, camera_rays, encode_bank, make_bank
from .step import precision_context

Engine = Literal["auto", "plain", "compiled", "fused"]
ENGINES = ("auto", "plain", "compiled", "fused")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Of the fused engine, by precision."""


class Picture(NamedTuple):
    """One rendered view, on the CPU."""

    rgb: Float[Tensor, "H W 3"]
    """In [0, 1]."""
    depth: Float[Tensor, "H W"]
    """Along the optical axis, in the units of the scene file."""
    seconds: float
    """From rays to picture; the features of the source views are not counted, they are shared by all pictures."""


@dataclass
class Renderer:
    """A model, ready to render views of a scene. Make it with `make_renderer`."""

    model: nn.Module
    scene: Scene
    bank: SourceBank | None
    chunk: Chunk
    precision: str
    encode_seconds: float
    """Time the source views' features took, once."""
    even: bool = False
    """Every chunk has the same number of rays, the last one padded, as compiled code and graphs want it."""
    engine: str = "plain PyTorch"
    """What renders, in words."""

    @property
    def device(self) -> torch.device:
        return self.bank.images.device if self.bank is not None else next(self.model.parameters()).device

    @torch.no_grad()
    def render(self, camera: Camera) -> Picture:
        """The view through `camera`. The result does not depend on the chunk size; when memory runs out, the chunk is halved."""
        start = time.perf_counter()
        near, far = self.scene.depth_range
        rays = camera_rays(camera, near, far, self.device)
        sources = None
        if self.model.sources:
            sources = self.bank.select(self.bank.order(camera.pose)[: self.model.sources])
        with precision_context(self.device, self.precision):
            rgb, depth = self._all(rays, sources)
        rgb = rgb.reshape(camera.height, camera.width, 3).clamp(0, 1).cpu()
        depth = depth.reshape(camera.height, camera.width).cpu() / self.scene.unit
        return Picture(rgb, depth, time.perf_counter() - start)

    def _all(self, rays: Rays, sources: Sources | None) -> tuple[Tensor, Tensor]:
        count = len(rays.pixel)
        rgb = torch.empty(count, 3, device=self.device)
        depth = torch.empty(count, device=self.device)
        done = 0

        def work(size: int) -> int:
            part = rays.chunk(done, size)
            new = len(part.pixel)
            colors = self.model(_padded(part, size) if self.even else part, sources)
            rgb[done : done + new] = colors.rgb[:new]
            depth[done : done + new] = colors.depth[:new]
            return done + new

        while done < count:
            done = self.chunk.attempt(work)
        return rgb, depth


def _padded(rays: Rays, size: int) -> Rays:
    """`size` rays, the last one repeated."""
    missing = size - len(rays.pixel)
    if missing == 0:
        return rays
    return Rays(*(torch.cat([part, part[-1:].expand(missing, -1)]) for part in rays[:3]), rays.near, rays.far)


def make_renderer(
    model: nn.Module,
    scene: Scene,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
    chunk: int | None = None,
    engine: Engine = "auto",
) -> Renderer:
    """Move the model and the scene's training views to the device and compute their features, each once.

    `chunk` is the number of rays at once; by default as many as the device's memory suggests. `engine` is `plain` (the PyTorch model),
    `compiled` (the same under torch.compile: a minute at the first picture), `fused` (GNT's kernels in one CUDA graph), or `auto`: fused
    on a GPU where the model has that form, else plain; `Renderer.engine` says which and why. UserError for too few training views, or an
    engine that cannot render this model.
    """
    if model.sources:
        check_sources(scene, model.sources)
    model, said = _with_engine(model.to(device).eval(), torch.device(device), precision, engine)
    even = not said.startswith("plain")
    rays = chunk if chunk is not None else first_chunk(model.bytes_per_ray(False), device)
    if chunk is None and even:
        rays = min(rays, RAYS)
    if not model.sources:
        return Renderer(model, scene, None, Chunk(rays), precision, 0.0, even, said)
    start = time.perf_counter()
    with precision_context(device, precision):
        bank = encode_bank(make_bank(scene, scene.train, device), model)
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return Renderer(model, scene, bank, Chunk(rays), precision, time.perf_counter() - start, even, said)


def _with_engine(model: nn.Module, device: torch.device, precision: str, engine: Engine) -> tuple[nn.Module, str]:
    """The model that renders, and its description."""
    if engine not in ENGINES:
        raise unknown("engine", engine, ENGINES)
    reason = why_not(model)
    if engine == "auto" and reason is None and device.type != "cuda":
        reason = "the fused engine is for GPUs: --engine fused asks for it"
    if engine == "plain" or (engine == "auto" and reason is not None):
        return model, f"plain PyTorch, {precision}" + (f" ({reason})" if engine == "auto" else "")
    if engine == "compiled":
        if isinstance(model, Nearest | Sweep):
            raise UserError("the floors have nothing to compile; use the engine 'plain'")
        # All of it, geometry included, for shapes that do not change.
        model.compile(dynamic=False)
        return model, f"compiled, {precision}"
    deployed = deploy_gnt(model, DTYPES[precision], device)
    backend = "triton kernels, CUDA graph" if device.type == "cuda" else "reference backend"
    unfused = deployed.program.unfused
    return deployed, f"fused, {precision}, {backend}" + (f" (as plain layers: {', '.join(unfused)})" if unfused else "")


def render_path(
    renderer: Renderer, cameras: list[Camera], seen: Callable[[int, Picture], None] = lambda number, picture: None
) -> list[Picture]:
    """Every camera of a path in turn; `seen(number, picture)` is called after each (to write files, to move a progress bar)."""
    pictures = []
    for number, camera in enumerate(cameras):
        pictures.append(renderer.render(camera))
        seen(number, pictures[-1])
    return pictures
