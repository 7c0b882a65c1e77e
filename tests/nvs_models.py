"""A GNT small enough to train in a test, and what it is trained by and asked."""

import torch

from shiftaddvit.nvs.gnt import GNT, GNTConfig
from shiftaddvit.nvs.projector import Seen
from shiftaddvit.nvs.train import NvsTrainConfig

TINY = GNTConfig(width=16, depth=2, samples=6, sources=3, feature_channels=4, feature_base=4)
SHORT = NvsTrainConfig(steps=6, rays=16, check_every=3, warmup_steps=2, source_jitter=1, measure_latency=False)


def tiny(seed=0, config=TINY):
    torch.manual_seed(seed)
    return GNT(config)


def seen(model, rays=4):
    torch.manual_seed(1)
    channels = 3 + model.config.feature_channels
    inputs = Seen(torch.rand(rays, 6, 3, channels), torch.rand(rays, 6, 3, 4), torch.ones(rays, 6, 3, 1))
    return inputs, torch.rand(rays, 6, 3), torch.rand(rays, 3)
