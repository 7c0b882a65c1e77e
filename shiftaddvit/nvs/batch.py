"""What one training step looks at: a target view, its sources, some of its pixels. All of it follows from the seed and the step."""

import random
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from .cameras import pixel_rays
from .scene import Scene
from .sources import Rays, SourceBank, Sources, make_bank


class Batch(NamedTuple):
    """Rays of one target view, the colours they should have, and the source views, without features."""

    rays: Rays
    target: Float[Tensor, "R 3"]
    sources: Sources | None


@dataclass(frozen=True)
class TrainingScene:
    """A scene whose training views are on the device."""

    scene: Scene
    bank: SourceBank

    @classmethod
    def of(cls, scene: Scene, device: torch.device | str) -> "TrainingScene":
        return cls(scene, make_bank(scene, scene.train, device))


def step_seed(seed: int, step: int) -> int:
    """Of everything random in one step, so that a resumed run goes on as if it had never stopped."""
    return (seed * 1_000_003 + step) % (1 << 62)


def draw_batch(scenes: list[TrainingScene], step: int, seed: int, rays: int, sources: int, jitter: int) -> Batch:
    """A scene with probability ∝ its views, a training view of it, `rays` pixels (uniform, with replacement) and source views.

    As GNT was trained: `sources` ± `jitter` random views of a nearest pool, one to three times as large; never the target itself.
    """
    choose = random.Random(step_seed(seed, step))
    chosen = choose.choices(scenes, weights=[len(one.bank.views) for one in scenes])[0]
    scene, bank = chosen.scene, chosen.bank
    place = choose.randrange(len(bank.views))
    selected = bank.select(_source_places(bank, place, sources, jitter, choose)) if sources else None
    device = bank.images.device
    generator = torch.Generator().manual_seed(step_seed(seed, step))
    index = torch.randint(scene.height * scene.width, (rays,), generator=generator).to(device)
    x, y = index % scene.width, index // scene.width
    pixel = torch.stack([x, y], dim=-1).float()
    origin, direction = pixel_rays(pixel, bank.intrinsics[place], bank.poses[place])
    near, far = scene.depth_range
    return Batch(Rays(origin, direction, pixel, near, far), bank.images[place, :, y, x].T, selected)


def _source_places(bank: SourceBank, place: int, sources: int, jitter: int, choose: random.Random) -> list[int]:
    near = bank.order(bank.places[place], without=bank.views[place])
    factor = choose.choices((1, 2, 3), weights=(0.2, 0.45, 0.35))[0]
    count = max(1, min(len(near), sources + choose.randint(-jitter, jitter)))
    return choose.sample(near[: count * factor], count)
