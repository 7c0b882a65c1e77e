"""Small models that baselines convert, and the published layers' recorded values."""

from pathlib import Path

import numpy as np
import torch
from torch import nn

import shiftaddvit

GOLDEN = Path(__file__).parent / "golden"
PYRAMID = {"embed_dims": (16, 16, 32, 32), "num_heads": (1, 2, 2, 2), "mlp_ratios": (2, 2, 2, 2), "num_classes": 5}
PLAIN = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}


def golden(name: str) -> dict[str, torch.Tensor]:
    return {key: torch.from_numpy(value) for key, value in np.load(GOLDEN / f"{name}.npz").items()}


def close(actual: torch.Tensor, expected: torch.Tensor, rtol: float = 1e-4) -> None:
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=1e-5)


def pvt_v2(name: str = "pvt_v2_b0", **more) -> nn.Module:
    torch.manual_seed(0)
    return shiftaddvit.create_model(name, {**PYRAMID, "depths": (1, 1, 1, 1), **more})


def pvt_v1(**more) -> nn.Module:
    torch.manual_seed(0)
    return shiftaddvit.create_model("pvt_tiny", {**PYRAMID, "img_size": 32, **more})


def vit() -> nn.Module:
    torch.manual_seed(0)
    return shiftaddvit.create_model("vit_tiny_patch16_224", PLAIN)


def images(count: int = 3) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))
