"""A quick look at held-out views while training: the same few thousand pixels every time."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .memory import Chunk, first_chunk
from .scene import Scene
from .sources import Rays, SourceBank, camera_rays, encode_bank
from .step import precision_context


@dataclass(frozen=True)
class HeldOut:
    """Some pixels of each held-out view."""

    views: tuple[tuple[Rays, Float[Tensor, "R 3"], Float[Tensor, "4 4"]], ...]
    """Rays and their true colours on the device, and the pose on the CPU."""

    @classmethod
    def of(cls, scene: Scene, device: torch.device | str, pixels: int = 4096) -> "HeldOut | None":
        """`pixels` in all, at random places that follow from the scene's size; None without held-out views."""
        if not scene.test:
            return None
        generator = torch.Generator().manual_seed(0)
        views = []
        for view in scene.test:
            index = torch.randperm(scene.height * scene.width, generator=generator)[: max(64, pixels // len(scene.test))]
            rays = camera_rays(scene.camera(view), *scene.depth_range)
            chosen = Rays(*(part[index].to(device) for part in rays[:3]), rays.near, rays.far)
            colors = scene.images[view].reshape(-1, 3)[index].float().div(255).to(device)
            views.append((chosen, colors, scene.poses[view]))
        return cls(tuple(views))

    @property
    def pixels(self) -> int:
        """Of all views together."""
        return sum(len(colors) for _, colors, _ in self.views)

    @torch.no_grad()
    def psnr(self, model: nn.Module, bank: SourceBank, precision: str) -> float:
        """Mean over the views, dB; the model is left in the mode it was in."""
        training = model.training
        model.eval()
        chunk = Chunk(first_chunk(model.bytes_per_ray(False), bank.images.device))
        with precision_context(bank.images.device, precision):
            full = encode_bank(bank, model)
            found = [chunk.attempt(lambda rays, view=view: self._one(model, full, view, rays)) for view in self.views]
        model.train(training)
        return sum(found) / len(found)

    def _one(self, model: nn.Module, bank: SourceBank, view: tuple[Rays, Tensor, Tensor], chunk: int) -> float:
        rays, truth, pose = view
        sources = bank.select(bank.order(pose)[: model.sources]) if model.sources else None
        parts = [model(rays.chunk(start, chunk), sources).rgb for start in range(0, len(truth), chunk)]
        error = (torch.cat(parts).clamp(0, 1) - truth).square().mean().item()
        return -10 * math.log10(max(error, 1e-12))
