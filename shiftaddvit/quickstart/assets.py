"""The embedded images and the model pre-trained on their data set; `assets/quickstart/README.md` says where they come from."""

from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import nn

from shiftaddvit.data.augment import AugmentConfig
from shiftaddvit.data.resident import ResidentLoader
from shiftaddvit.serialization import load

CLASS_NAMES = ("T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
ARCHITECTURE = "pvt_v2_b0"
ARCHITECTURE_ARGS = {
    "num_classes": len(CLASS_NAMES),
    "embed_dims": (32, 64, 128),
    "depths": (1, 2, 1),
    "num_heads": (1, 2, 4),
    "mlp_ratios": (4, 4, 4),
    "sr_ratios": (2, 1, 1),
}
"""PVTv2 with three narrow stages over 64, 16 and 4 tokens of a 32×32 image."""
SIDE = 32
DATA = "Fashion-MNIST, the embedded part"
AUGMENT = AugmentConfig(crop="pad", pad=2, flip=0.5, rand_augment=None, erasing=0.0, mixup=0.0, cutmix=0.0, label_smoothing=0.0)
"""Small shifts and flips; labels are smoothed by the loss."""


def asset(name: str) -> Path:
    """A file of `assets/quickstart`."""
    return Path(str(resources.files("shiftaddvit") / "assets" / "quickstart" / name))


def load_images() -> "EmbeddedImages":
    """The embedded part of Fashion-MNIST: 6,000 training and 2,000 test images, as many of every class."""
    with np.load(asset("fashion_mnist.npz"), allow_pickle=False) as file:
        return EmbeddedImages(*(file[name] for name in ("train_images", "train_labels", "test_images", "test_labels")))


def load_dense(device: torch.device | str = "cpu") -> nn.Module:
    """The dense model that `shiftaddvit.quickstart.pretrain` trained."""
    return load(asset("dense.safetensors"), device)


def as_model_input(images: UInt8[np.ndarray, "N 28 28"]) -> UInt8[np.ndarray, "N 32 32 3"]:
    """Pad 28×28 grey images to 32×32 with black and repeat them on three channels."""
    margin = (SIDE - images.shape[1]) // 2
    padded = np.pad(images, ((0, 0), (margin, margin), (margin, margin)))
    return np.repeat(padded[..., None], 3, axis=-1)


def training_loader(images: UInt8[np.ndarray, "N 28 28"], labels: Int64[np.ndarray, "N"], batch: int, seed: int,
                    device: torch.device | str = "cpu") -> ResidentLoader:  # fmt: skip
    """Shuffled, augmented batches."""
    return ResidentLoader(as_model_input(images), labels, train=True, batch_size=batch, augment=AUGMENT, classes=len(CLASS_NAMES),
                          device=device, seed=seed)  # fmt: skip


def test_loader(images: UInt8[np.ndarray, "N 28 28"], labels: Int64[np.ndarray, "N"], device: torch.device | str = "cpu") -> ResidentLoader:
    """All images, in order."""
    return ResidentLoader(as_model_input(images), labels, train=False, batch_size=250, classes=len(CLASS_NAMES), device=device)


@dataclass(frozen=True, eq=False)
class EmbeddedImages:
    """Grey images with their classes, in two disjoint parts."""

    train_images: UInt8[np.ndarray, "6000 28 28"]
    """From the training split of Fashion-MNIST, which the dense model was trained on."""
    train_labels: Int64[np.ndarray, "6000"]
    """Index into `CLASS_NAMES`."""
    test_images: UInt8[np.ndarray, "2000 28 28"]
    """From its test split, never trained on."""
    test_labels: Int64[np.ndarray, "2000"]
    """Index into `CLASS_NAMES`."""
