"""What the benchmark of rendering measures: random pictures, random models, and rays for a single step."""

import torch
from torch import nn

from shiftaddvit.reparam import reparameterize

from ..cameras import look_at
from ..gnt import GNT, GNTConfig
from ..scene import Scene, every_eighth, normalise
from ..sources import camera_rays, encode_bank, make_bank
from .engine import RayEngine
from .steps import Target


def noise_scene(width: int, height: int, seed: int) -> Scene:
    """Noise seen by cameras on a small circle: what a forward-facing capture looks like to the kernels."""
    generator = torch.Generator().manual_seed(seed)
    count = 16
    images = torch.randint(0, 256, (count, height, width, 3), dtype=torch.uint8, generator=generator)
    angles = torch.arange(count, dtype=torch.float64) * (2 * torch.pi / count)
    places = torch.stack([angles.cos(), 0.6 * angles.sin(), torch.zeros_like(angles)], dim=-1) * 0.3
    target = torch.tensor([0.0, 0.0, -4.0], dtype=torch.float64).numpy()
    up = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64).numpy()
    poses = torch.stack([look_at(place.numpy(), target, up) for place in places])
    focal = 0.8 * width
    intrinsics = torch.tensor([[focal, 0, (width - 1) / 2], [0, focal, (height - 1) / 2], [0, 0, 1]], dtype=torch.float64)
    scene = Scene(
        "noise", tuple(f"{number:02d}" for number in range(count)), images, intrinsics.repeat(count, 1, 1), poses,
        torch.tensor([[1.5, 12.0]], dtype=torch.float64).repeat(count, 1), every_eighth(count), torch.eye(4, dtype=torch.float64),
    )  # fmt: skip
    return normalise(scene)


def view_model(row: str, samples: int, seed: int) -> nn.Module:
    """A GNT, or the row of the 3D table made of it, with random weights."""
    torch.manual_seed(seed)
    model = GNT(GNTConfig(samples=samples))
    return (model if row == "gnt" else reparameterize(model, row)).eval()


def rays_of(scene: Scene, engine: RayEngine, rays: int, device: str) -> Target:
    """The first rays of the first view, as the engine's steps read them; moves the engine to the device."""
    engine.to(device)
    bank = encode_bank(make_bank(scene, scene.train, device), engine)
    every = camera_rays(scene.camera(0), *scene.depth_range, device)
    near, far = scene.depth_range
    depths = 1 / torch.linspace(1 / near, 1 / far, engine.samples, device=device)
    views = engine.prepare(bank.select(bank.order(scene.camera(0).pose)[: engine.sources]))
    return Target(every.origin[:rays].contiguous(), every.direction[:rays].contiguous(), depths, *views)
