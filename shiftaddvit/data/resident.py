"""A data set that lives on the GPU as bytes and is augmented there, for data small enough to fit."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count, repeat
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Int64, UInt8
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.mixup import mixup_target
from torch import Tensor

from shiftaddvit.data import batch_ops
from shiftaddvit.data.augment import AugmentConfig
from shiftaddvit.data.decode import decode
from shiftaddvit.data.draws import Draws, draw
from shiftaddvit.data.images import ImageData
from shiftaddvit.data.order import Shard, current_shard, evaluation_order, generator, training_order
from shiftaddvit.errors import UserError

IMAGES_DRAWN = 8192  # random numbers are drawn for about so many images at once: few large draws are faster than many small


def free_bytes(device: torch.device | str) -> int:
    """Memory that is free on a GPU, or installed for the CPU."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def fits(images: int, image_size: int | tuple[int, int], device: torch.device | str) -> bool:
    """Whether so many decoded images leave two thirds of the device's free memory to the model."""
    height, width = _pair(image_size)
    return 3 * images * height * width * 3 <= free_bytes(device)


def build_resident_loaders(
    train: ImageData,
    val: ImageData,
    *,
    image_size: int | tuple[int, int],
    batch_size: int,
    device: torch.device | str,
    workers: int | None = None,
    augment: AugmentConfig = AugmentConfig(),
    mean: tuple[float, float, float] = IMAGENET_DEFAULT_MEAN,
    std: tuple[float, float, float] = IMAGENET_DEFAULT_STD,
    dtype: torch.dtype = torch.float32,
    shard: Shard | None = None,
    seed: int = 0,
    cache: str | os.PathLike | None = None,
) -> tuple["ResidentLoader", "ResidentLoader"]:
    """Decode both splits at `image_size` and keep them on the device; for the arguments see `ResidentLoader` and `decode`.

    Args:
        cache: folder for the decoded images, so that the next run need not decode; None for none.

    Raises:
        UserError: the decoded images would fill the device; `fits` tells beforehand.
    """
    shard = current_shard() if shard is None else shard
    size = _pair(image_size)
    if not fits(len(train) + len(val), size, device):
        raise UserError(
            f"{len(train) + len(val)} images of {size[0]}×{size[1]} are too many to keep on {device}, "
            f"{free_bytes(device) / 2**30:.1f} GiB free: use build_loaders"
        )
    common = {"batch_size": batch_size, "classes": train.num_classes, "mean": mean, "std": std, "device": device}
    common |= {"dtype": dtype, "shard": shard, "seed": seed}
    loaders = []
    for name, data in (("train", train), ("val", val)):
        file = None if cache is None else Path(cache) / f"{name}-{size[0]}x{size[1]}.npy"
        images, labels = decode(data, size, workers=workers, cache=file)
        loaders.append(ResidentLoader(images, labels, train=name == "train", augment=augment, **common))
    return loaders[0], loaders[1]


class ResidentLoader:
    """Batches of a uint8 tensor (N, H, W, 3) that stays on `device`.

    Iterating yields `(images, targets)`: images (B, 3, h, w), normalised, channels-last, of `dtype`; targets (B,) int64, or
    (B, classes) float32 where the augmentation mixes or smooths labels. With `train` the images are shuffled, augmented and the
    last incomplete batch is dropped; otherwise they come in order, only normalised, all of them.

    What a batch holds depends on (seed, epoch, step, rank) alone, so a run resumed with `set_epoch` and `start_at` equals an
    uninterrupted one, and a CPU draws what a GPU draws (the noise in erased boxes apart).

    Args:
        images: uint8 (N, H, W, 3), array or tensor.
        labels: integers (N,).
        train: whether to shuffle, augment and drop the incomplete batch.
        image_size: side or (height, width) of the images produced; None for that of `images`.
        batch_size: images a batch, for each process.
        augment: how training images are changed; ignored unless `train`.
        classes: number of classes; None for the largest label + 1.
        shard: which process this is; `current_shard()` for the running process group.

    Raises:
        UserError: images that are not uint8 (N, H, W, 3), labels that do not fit, or fewer images than one batch.
    """

    def __init__(
        self,
        images: UInt8[Tensor | np.ndarray, "N H W 3"],
        labels: Int64[Tensor | np.ndarray, "N"],
        *,
        train: bool,
        batch_size: int,
        augment: AugmentConfig = AugmentConfig(),
        image_size: int | tuple[int, int] | None = None,
        classes: int | None = None,
        mean: tuple[float, float, float] = IMAGENET_DEFAULT_MEAN,
        std: tuple[float, float, float] = IMAGENET_DEFAULT_STD,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        shard: Shard = Shard(),
    ) -> None:
        images, labels = torch.as_tensor(images), torch.as_tensor(labels)
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[-1] != 3:
            raise UserError(f"images are {images.dtype} {tuple(images.shape)}: must be uint8 (N, H, W, 3)")
        if labels.shape != images.shape[:1]:
            raise UserError(f"labels are {tuple(labels.shape)}: must be ({len(images)},), one for each image")
        if len(images) == 0:
            raise UserError("images are empty: at least one is needed")
        if train and batch_size > len(images) // shard.world:
            raise UserError(f"batch_size={batch_size}: only {len(images) // shard.world} training images for each process")
        largest = int(labels.max())
        self.classes = largest + 1 if classes is None else classes
        if int(labels.min()) < 0 or largest >= self.classes:
            raise UserError(f"labels run from {int(labels.min())} to {largest}: must be within 0 … {self.classes - 1}")
        self.device = torch.device(device)
        self.images = images.to(self.device)
        self.labels = labels.long().to(self.device)
        self.train, self.batch_size, self.config = train, batch_size, augment
        self.size = tuple(images.shape[1:3]) if image_size is None else _pair(image_size)
        self.mean, self.std, self.dtype = tuple(mean), tuple(std), dtype
        self.seed, self.shard = seed, shard
        self.epoch = self._start = 0
        per_channel = torch.tensor([mean, std], dtype=torch.float32, device=self.device).view(2, 1, 3, 1, 1)
        self._fill = 255 * per_channel[0]
        self._scale, self._offset = 1 / (255 * per_channel[1]), -per_channel[0] / per_channel[1]  # (pixels / 255 - mean) / std
        self._noise = torch.Generator(self.device)

    def __len__(self) -> int:
        """Batches in a whole epoch, wherever the next one starts."""
        if self.train:
            return len(self.images) // self.shard.world // self.batch_size
        return -(-len(self.order()) // self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order and augmentation of the epochs to come."""
        self.epoch = epoch

    def start_at(self, step: int) -> None:
        """Let the next iteration begin with batch `step`; later ones begin at 0 again."""
        if not 0 <= step <= len(self):
            raise UserError(f"step={step}: this epoch has {len(self)} batches")
        self._start = step

    def order(self) -> Int64[np.ndarray, "n"]:
        """Indices of the images in the order this process yields them in the current epoch."""
        if self.train:
            return training_order(len(self.images), self.seed, self.epoch, self.shard)
        return evaluation_order(len(self.images), self.shard)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        start, self._start = self._start, 0
        order = batch_ops.to_device(self.order(), self.device)
        draws = self._draws(start) if self.train else repeat(None)
        for step, drawn in zip(range(start, len(self)), draws):
            index = order[step * self.batch_size : (step + 1) * self.batch_size]
            yield self._evaluation_batch(index) if drawn is None else self._training_batch(index, drawn)

    def _draws(self, start: int) -> Iterator[batch_ops.Batch]:
        """Random numbers for the batches from `start` on, drawn some batches at a time and one such group ahead."""
        steps = max(1, min(IMAGES_DRAWN // self.batch_size, len(self)))
        source, epoch = tuple(self.images.shape[1:3]), self.epoch

        def group(number: int) -> Draws:
            rng = generator("augment", self.seed, epoch, number, self.shard.rank)
            return draw(rng, steps, self.batch_size, self.config, source, self.size)

        with ThreadPoolExecutor(1) as ahead:
            first = start // steps
            coming = ahead.submit(group, first)
            for number in count(first):
                drawn = coming.result()
                coming = ahead.submit(group, number + 1)
                yield from batch_ops.batches(drawn, self.device)[start - number * steps if number == first else 0 :]

    @torch.no_grad()
    def _evaluation_batch(self, index: Int64[Tensor, "B"]) -> tuple[Tensor, Tensor]:
        pixels = self.images[index].permute(0, 3, 1, 2).float()
        if pixels.shape[2:] != self.size:
            pixels = F.interpolate(pixels, self.size, mode="bicubic", antialias=True).clamp_(0, 255)
        return self._finish(torch.addcmul(self._offset, pixels, self._scale)), self.labels[index]

    @torch.no_grad()
    def _training_batch(self, index: Int64[Tensor, "B"], drawn: batch_ops.Batch) -> tuple[Tensor, Tensor]:
        config = self.config
        with torch.autocast(self.device.type, enabled=False):  # colours need float32, also inside a training loop's autocast
            pixels = batch_ops.augment(self.images[index], drawn, self.size, self._fill, config.interpolation)
            images = torch.addcmul(self._offset, pixels, self._scale)
            if drawn.boxes is not None:
                self._noise.manual_seed(drawn.noise)
                images = batch_ops.erase(images, drawn.boxes, config.erasing_mode, self._noise)
            images = batch_ops.mix(images, *drawn.mix)
        targets = self.labels[index]
        if config.soft_targets:
            targets = mixup_target(targets, self.classes, lam=drawn.mix[0], smoothing=config.label_smoothing)
        return self._finish(images), targets

    def _finish(self, images: Tensor) -> Tensor:
        return images.to(self.dtype, memory_format=torch.channels_last)


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)
