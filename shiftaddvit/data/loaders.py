"""Loaders that decode images as they are needed, over worker processes; resumable to the bit on CPU."""

import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from jaxtyping import Int64
from PIL import Image, ImageOps
from timm.data import Mixup, create_transform
from timm.data.auto_augment import RandAugment as TimmRandAugment
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.mixup import mixup_target
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import Compose, RandomCrop, RandomHorizontalFlip

from shiftaddvit.data.augment import AugmentConfig
from shiftaddvit.data.decode import Fit
from shiftaddvit.data.images import ImageData, Unreadable
from shiftaddvit.data.order import Shard, current_shard, evaluation_order, generator, training_order
from shiftaddvit.errors import UserError

NOT_READ = -100
"""Target of an evaluation image that could not be read; `evaluate` and `cross_entropy` leave it out."""


def build_loaders(
    train: ImageData,
    val: ImageData,
    *,
    image_size: int | tuple[int, int],
    batch_size: int,
    workers: int = 4,
    augment: AugmentConfig = AugmentConfig(),
    mean: tuple[float, float, float] = IMAGENET_DEFAULT_MEAN,
    std: tuple[float, float, float] = IMAGENET_DEFAULT_STD,
    crop_pct: float = 1.0,
    shard: Shard | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> tuple["ImageLoader", "ImageLoader"]:
    """A training and a validation loader on timm's transforms; for the arguments see `ImageLoader`.

    `shard` None takes the rank from the running process group. The validation loader shares classes with the training one.
    """
    shard = current_shard() if shard is None else shard
    common = {"image_size": image_size, "batch_size": batch_size, "workers": workers, "mean": mean, "std": std}
    common |= {"shard": shard, "seed": seed, "device": device}
    return (
        ImageLoader(train, train=True, augment=augment, **common),
        ImageLoader(val, train=False, crop_pct=crop_pct, **common),
    )


@contextmanager
def random_state(seed: int) -> Iterator[None]:
    """Seed the global random numbers that timm's and torchvision's transforms draw from, and put them back afterwards."""
    before = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.random.set_rng_state(before[2])


def posterize(image: Image.Image, bits: int, **options: object) -> Image.Image:
    """Keep the `bits` leading bits. timm's strongest level asks for none at all, which Pillow has come to refuse.

    `options` (fill colour, resampling) is what timm hands to every operation; none of it matters here.
    """
    return ImageOps.posterize(image, bits) if bits > 0 else Image.new(image.mode, image.size)


def training_transform(
    size: tuple[int, int], augment: AugmentConfig, mean: tuple[float, float, float], std: tuple[float, float, float]
) -> Compose:
    """Pillow image to normalised tensor (3, h, w), by timm's transforms."""
    crop, policy, final = create_transform(
        size,
        is_training=True,
        separate=True,
        scale=augment.scale,
        ratio=augment.ratio,
        hflip=augment.flip,
        color_jitter=augment.color_jitter or None,
        auto_augment=augment.rand_augment,
        interpolation=augment.interpolation,
        mean=mean,
        std=std,
        re_prob=augment.erasing,
        re_mode=augment.erasing_mode,
    )
    for step in policy.transforms:
        for operation in step.ops if isinstance(step, TimmRandAugment) else ():
            if operation.name.startswith("Posterize"):
                operation.aug_fn = posterize
    if augment.crop != "resized":
        fill = tuple(round(255 * value) for value in mean)
        shift = [RandomCrop(size, padding=augment.pad, fill=fill)] if augment.crop == "pad" else []
        crop = Compose([Fit(size), *shift, RandomHorizontalFlip(augment.flip)])
    return Compose([crop, policy, final])


class ImageLoader:
    """Batches of an `ImageData`, decoded by worker processes.

    Iterating yields `(images, targets)`: images (B, 3, h, w) float32, normalised; targets (B,) int64, or (B, classes) float32
    where the augmentation mixes or smooths labels. With `train` the images are shuffled, augmented and the last incomplete batch is
    dropped; otherwise they come in order, all of them, resized and cut to the central `crop_pct`.

    The order depends on (seed, epoch, rank) and what happens to an image on (seed, epoch, its index) alone, whatever the number of
    workers; a run resumed with `set_epoch` and `start_at` equals an uninterrupted one, and skipped images are not decoded.

    Images that cannot be read are gathered in `unreadable`, index to reason, and their number is given as one warning at the end of
    the epoch: in training the next readable image takes their place, in evaluation their target is `NOT_READ`.

    Args:
        batch_size: images a batch, for each process.
        workers: worker processes; 0 decodes in this one.
        augment: how training images are changed; ignored unless `train`.
        crop_pct: share of the resized image's side that is kept in evaluation; 0.875 or 0.9 is usual for ImageNet at 224.
        device: where batches are moved to.

    Raises:
        UserError: settings that do not fit; while iterating, `Unreadable` where the data are `strict`.
    """

    def __init__(
        self,
        data: ImageData,
        *,
        train: bool,
        image_size: int | tuple[int, int],
        batch_size: int,
        workers: int = 4,
        augment: AugmentConfig = AugmentConfig(),
        mean: tuple[float, float, float] = IMAGENET_DEFAULT_MEAN,
        std: tuple[float, float, float] = IMAGENET_DEFAULT_STD,
        crop_pct: float = 1.0,
        classes: int | None = None,
        shard: Shard = Shard(),
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        if batch_size < 1 or workers < 0:
            raise UserError(f"batch_size={batch_size}, workers={workers}: must be at least 1 and 0")
        if train and batch_size > len(data) // shard.world:
            raise UserError(f"batch_size={batch_size}: only {len(data) // shard.world} training images for each process")
        if train and augment.mixes and batch_size % 2:
            raise UserError(f"batch_size={batch_size}: must be even for mixup and cutmix")
        size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        self.data, self.train, self.batch_size, self.config = data, train, batch_size, augment
        self.classes = data.num_classes if classes is None else classes
        self.shard, self.seed, self.device = shard, seed, torch.device(device)
        self.unreadable: dict[int, str] = {}
        self._reported = 0
        self._batches = _Batches(self)
        if train:
            transform = training_transform(size, augment, mean, std)
        else:
            transform = create_transform(size, crop_pct=crop_pct, interpolation="bicubic", mean=mean, std=std)
        self._mix = Mixup(
            mixup_alpha=augment.mixup,
            cutmix_alpha=augment.cutmix,
            prob=augment.mix_probability,
            switch_prob=augment.switch_probability,
            label_smoothing=augment.label_smoothing,
            num_classes=self.classes,
        )
        self._loader = DataLoader(
            _Decoded(data, transform, seed, train),
            batch_sampler=self._batches,
            collate_fn=_collate,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # its own, or starting an epoch would move the model's random numbers
        )

    def __len__(self) -> int:
        """Batches in a whole epoch, wherever the next one starts."""
        return self._batches.whole()

    @property
    def epoch(self) -> int:
        """The epoch whose order and augmentation come next."""
        return self._batches.epoch

    def set_epoch(self, epoch: int) -> None:
        """Choose the order and augmentation of the epochs to come."""
        self._batches.epoch = epoch

    def start_at(self, step: int) -> None:
        """Let the next iteration begin with batch `step`, decoding nothing before it; later ones begin at 0 again."""
        if not 0 <= step <= len(self):
            raise UserError(f"step={step}: this epoch has {len(self)} batches")
        self._batches.start = step

    def order(self) -> Int64[np.ndarray, "n"]:
        """Indices of the images in the order this process yields them in the current epoch."""
        return self._batches.order()

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        step, epoch = self._batches.start, self._batches.epoch
        for images, targets, failures in self._loader:
            for index, reason in failures:
                if self.data.strict or (self.train and NOT_READ in targets):
                    raise Unreadable(reason)
                self.unreadable[index] = reason
            images = images.to(self.device, non_blocking=True)
            targets = targets.to(self.device, non_blocking=True)
            yield self._mixed(images, targets, epoch, step) if self.train else (images, targets)
            step += 1
        self._report()

    def _mixed(self, images: Tensor, targets: Tensor, epoch: int, step: int) -> tuple[Tensor, Tensor]:
        if self.config.mixes:
            with random_state(int(generator("mix", self.seed, epoch, step, self.shard.rank).integers(2**63))):
                return self._mix(images, targets)
        if self.config.label_smoothing:
            return images, mixup_target(targets, self.classes, smoothing=self.config.label_smoothing)
        return images, targets

    def _report(self) -> None:
        if len(self.unreadable) > self._reported:
            self._reported = len(self.unreadable)
            first = next(iter(self.unreadable.values()))
            done = "replaced by the next ones" if self.train else "left out"
            warnings.warn(f"{len(self.unreadable)} of {len(self.data)} images could not be read and were {done}, such as: {first}", stacklevel=3)


class _Batches:
    """Lists of (epoch, index): workers need no other state, so they may live on from epoch to epoch."""

    def __init__(self, loader: ImageLoader) -> None:
        self.images, self.blocks = len(loader.data), loader.data.store.blocks
        self.train, self.size, self.seed, self.shard = loader.train, loader.batch_size, loader.seed, loader.shard
        self.epoch = self.start = 0

    def order(self) -> np.ndarray:
        if self.train:
            return training_order(self.images, self.seed, self.epoch, self.shard, self.blocks)
        return evaluation_order(self.images, self.shard)

    def whole(self) -> int:
        if self.train:
            return self.images // self.shard.world // self.size
        return -(-len(self.order()) // self.size)

    def __len__(self) -> int:
        return self.whole() - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        start, self.start, epoch, order = self.start, 0, self.epoch, self.order()
        for step in range(start, self.whole()):
            yield [(epoch, int(index)) for index in order[step * self.size : (step + 1) * self.size]]


class _Decoded(Dataset):
    """(epoch, index) to (tensor, label, failures): failures travel as data, so that the main process counts and names them."""

    def __init__(self, data: ImageData, transform: Compose, seed: int, train: bool) -> None:
        self.data, self.transform, self.seed, self.train = data, transform, seed, train

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int, list[tuple[int, str]]]:
        epoch, index = key
        failures: list[tuple[int, str]] = []
        try:
            image, found = self.data.read(index), index
        except Unreadable as error:
            failures.append((index, str(error)))
            if self.data.strict or not self.train:
                return self._blank(), NOT_READ, failures
            try:
                image, found = self.data.read_or_next(index)
            except Unreadable as none_left:
                return self._blank(), NOT_READ, [(index, str(none_left))]
        with random_state(int(generator("image", self.seed, epoch, index).integers(2**63))):
            return self.transform(image), int(self.data.labels[found]), failures

    def _blank(self) -> Tensor:
        with random_state(0):
            return torch.zeros_like(self.transform(Image.new("RGB", (8, 8))))


def _collate(samples: list[tuple[Tensor, int, list[tuple[int, str]]]]) -> tuple[Tensor, Tensor, list[tuple[int, str]]]:
    images, labels, failures = zip(*samples, strict=True)
    return torch.stack(images), torch.tensor(labels), [failure for several in failures for failure in several]
