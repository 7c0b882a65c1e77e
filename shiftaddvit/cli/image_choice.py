"""From what the user calls data to loaders: how a model wants its images, and where they come from."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shiftaddvit.errors import UserError

from .model_choice import own_size
from .options import one_of

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor, nn

    from shiftaddvit.data.augment import AugmentConfig
    from shiftaddvit.data.images import ImageData, ImageStore
    from shiftaddvit.data.loaders import ImageLoader


@dataclass(frozen=True)
class ImageForm:
    """How a model wants its images."""

    size: tuple[int, int]
    """(height, width)."""
    crop_pct: float
    """Share of a side that evaluation looks at."""
    mean: tuple[float, float, float]
    """Subtracted, for each channel."""
    std: tuple[float, float, float]
    """Then divided by."""

    def __post_init__(self) -> None:
        if not 0 < self.crop_pct <= 1:
            raise UserError(f"--crop-pct must be above 0 and at most 1, got {self.crop_pct:g}")
        if min(self.size) < 1:
            raise UserError(f"--image-size must be at least 1, got {self.size[0]}×{self.size[1]}")


@dataclass(frozen=True)
class DataChoice:
    """DATA and the options that go with it."""

    data: str
    """Path or name."""
    strict: bool = False
    """Whether an unreadable image stops."""
    root: Path | None = None
    """Where a named data set lies."""
    download: bool = False
    """Whether it may be fetched."""

    def open(self, split: str) -> "ImageData":
        """One split."""
        from shiftaddvit.data.sources import open_dataset

        return open_dataset(self.data, split, strict=self.strict, root=self.root, download=self.download)


def image_form(model: "nn.Module", size: tuple[int, int] | None, crop_pct: float | None, stored: dict[str, Any]) -> ImageForm:
    """What was asked for, else what the model's file says, else what timm knows of the model."""
    from timm.data import resolve_model_data_config

    known = resolve_model_data_config(model)
    if size is None:
        size = tuple(stored.get("image_size") or own_size(model))
    if crop_pct is None:
        usual = known["crop_pct"] if size == tuple(known["input_size"][1:]) else 1.0
        crop_pct = stored.get("crop_pct", usual)
    return ImageForm(size, crop_pct, tuple(known["mean"]), tuple(known["std"]))


def default_workers(given: int | None) -> int:
    """One a core that this process may use, at most eight."""
    return min(8, len(os.sched_getaffinity(0))) if given is None else given


def evaluation_loader(data: "ImageData", form: ImageForm, batch_size: int, workers: int | None, device: object) -> "ImageLoader":
    """Every image of this process, in order."""
    from shiftaddvit.data.loaders import ImageLoader
    from shiftaddvit.data.order import current_shard

    return ImageLoader(
        data, train=False, image_size=form.size, batch_size=batch_size, workers=default_workers(workers), mean=form.mean, std=form.std,
        crop_pct=form.crop_pct, shard=current_shard(), device=device,
    )  # fmt: skip


def training_loaders(train: "ImageData", val: "ImageData", form: ImageForm, *, batch_size: int, workers: int | None, resident: str,
                     augment: "AugmentConfig", seed: int, device: Any) -> tuple[Any, Any]:  # fmt: skip
    """The training and the validation loader; on a GPU with room the images live there, as `resident` allows."""
    from shiftaddvit.data.loaders import build_loaders
    from shiftaddvit.data.resident import build_resident_loaders, fits

    one_of("--resident", resident, ("auto", "yes", "no"))
    if resident == "yes" and form.crop_pct != 1:
        raise UserError(f"--resident yes keeps whole images: add --crop-pct 1 (it is {form.crop_pct:g} now)")
    there = resident == "yes" or (
        resident == "auto" and device.type == "cuda" and form.crop_pct == 1 and fits(len(train) + len(val), form.size, device)
    )
    common = {"image_size": form.size, "batch_size": batch_size, "augment": augment, "mean": form.mean, "std": form.std, "seed": seed}
    if there:
        return build_resident_loaders(train, val, **common, workers=default_workers(workers), device=device)
    return build_loaders(train, val, **common, workers=default_workers(workers), crop_pct=form.crop_pct, device=device)


def augmentation(name: str) -> "AugmentConfig":
    """`default` as PVT and DeiT are trained, `light` shifts and flips, `none`."""
    from shiftaddvit.data.augment import AugmentConfig

    one_of("--augment", name, ("default", "light", "none"))
    light = {"crop": "pad", "rand_augment": None, "erasing": 0.0, "mixup": 0.0, "cutmix": 0.0}
    return {"default": AugmentConfig(), "light": AugmentConfig(**light), "none": AugmentConfig.none()}[name]


def check_apart(train: "ImageData", val: "ImageData", data: str) -> None:
    """Raise UserError if both splits are the same images: their accuracy would mean nothing."""
    names = [(len(one), one.store.name(0), one.store.name(len(one) - 1)) for one in (train, val)]
    if names[0] == names[1]:
        raise UserError(f"{data} has no validation images of its own: give them with --val, or --val none to go without")


def some_images(data: "ImageData", form: ImageForm, count: int, seed: int = 0) -> "Tensor":
    """(count, 3, H, W) images drawn at random, as evaluation sees them; fewer where some cannot be read."""
    images, labels = next(iter(evaluation_loader(sample(data, count, seed), form, count, 0, "cpu")))
    return images[labels >= 0]


def sample(data: "ImageData", count: int, seed: int = 0) -> "ImageData":
    """`count` images drawn at random (all, if there are no more), in the order of the data."""
    from shiftaddvit.data.images import ImageData

    if count < 1:
        raise UserError(f"--images must be at least 1, got {count}")
    if count >= len(data):
        return data
    drawn = np.sort(np.random.default_rng(seed).choice(len(data), count, replace=False))
    return ImageData(_Sample(data.store, drawn), strict=data.strict)


def image_files(folder: Path, limit: int | None, option: str) -> list[Path]:
    """The first pictures (all for None) of a folder and the folders below it, by name. UserError, naming `option`, where there is none."""
    if not folder.is_dir():
        raise UserError(f"{option} {str(folder)!r} is not a folder")
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp"))[:limit]
    if not found:
        raise UserError(f"{option} {str(folder)!r} has no .jpg, .png or .webp files")
    return found


def spread(files: list[Path], count: int) -> list[Path]:
    """`count` of the files, evenly spread over all, so that folders of classes each give some."""
    return files if count >= len(files) else [files[number * len(files) // count] for number in range(count)]


def as_input(file: Path, form: ImageForm) -> "Tensor":
    """(3, H, W): a picture as the model wants it. UserError for a file that cannot be read."""
    from PIL import Image, UnidentifiedImageError
    from timm.data import create_transform

    transform = create_transform((3, *form.size), mean=form.mean, std=form.std, crop_pct=form.crop_pct)
    try:
        return transform(Image.open(file).convert("RGB"))
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise UserError(f"{file} cannot be read as a picture: {error}") from None


def as_picture(image: "Tensor", form: ImageForm) -> "Tensor":
    """(H, W, 3) bytes: what `as_input` made, back for people to look at."""
    import torch

    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (form.mean, form.std))
    return ((image * std + mean) * 255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0)


class _Sample:
    """Some images of a store."""

    def __init__(self, store: "ImageStore", drawn: np.ndarray) -> None:
        self._store, self._drawn = store, drawn
        self.labels, self.classes, self.blocks = store.labels[drawn], store.classes, None

    def name(self, index: int) -> str:
        """As in the store."""
        return self._store.name(int(self._drawn[index]))

    def image(self, index: int) -> "Image.Image":
        """The decoded image."""
        return self._store.image(int(self._drawn[index]))
