"""What is done to training images, as data: the same description drives the per-image and the GPU-resident loaders."""

import re
from dataclasses import dataclass
from typing import Literal

from shiftaddvit.errors import UserError


def parse_rand_augment(text: str) -> "RandAugment":
    """Read timm's notation, e.g. `rand-m9-mstd0.5-inc1`. Raises `UserError` for parts that are not m, n, p, mstd or inc."""
    head, *parts = text.split("-")
    values: dict[str, float] = {}
    for part in parts:
        match = re.fullmatch(r"(mstd|inc|m|n|p)(\d+(?:\.\d+)?)", part)
        if match is None:
            raise UserError(f"rand_augment={text!r}: part {part!r} is not one of m9, n2, p0.5, mstd0.5, inc1")
        values[match[1]] = float(match[2])
    if head != "rand":
        raise UserError(f"rand_augment={text!r}: must look like rand-m9-mstd0.5-inc1, or be None")
    return RandAugment(
        magnitude=values.get("m", 10.0),
        deviation=values.get("mstd", 0.0),
        rounds=int(values.get("n", 2)),
        probability=values.get("p", 0.5),
        increasing=bool(values.get("inc", 0)),
    )


@dataclass(frozen=True)
class RandAugment:
    """RandAugment (Cubuk et al., 2020) with timm's operations and ranges."""

    magnitude: float
    """Strength on a scale of 0 to 10."""
    deviation: float
    """Standard deviation of the strength, drawn for each operation; above 100 it is uniform from 0 to `magnitude`."""
    rounds: int
    """Operations drawn for each image."""
    probability: float
    """Chance that a drawn operation is applied."""
    increasing: bool
    """Whether a higher strength always means a stronger change (timm's `inc1`)."""

    def __post_init__(self) -> None:
        if not 0 <= self.magnitude <= 10:
            raise UserError(f"rand_augment magnitude m={self.magnitude:g}: must be between 0 and 10")
        if not 0 <= self.probability <= 1:
            raise UserError(f"rand_augment probability p={self.probability:g}: must be between 0 and 1")


@dataclass(frozen=True)
class AugmentConfig:
    """Training augmentation; the defaults are those PVT and DeiT are trained with, which the paper inherits (Section 5.1)."""

    crop: Literal["resized", "pad", "none"] = "resized"
    """`resized`: a random box, resized; `pad`: a shift by at most `pad` pixels; `none`: the whole image."""
    scale: tuple[float, float] = (0.08, 1.0)
    """Share of the image's area that a resized crop may cover."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Width over height that a resized crop may have."""
    pad: int = 4
    """Largest shift in pixels, for `crop="pad"`."""
    flip: float = 0.5
    """Chance of a horizontal flip."""
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    """How resized crops are sampled."""
    rand_augment: str | None = "rand-m9-mstd0.5-inc1"
    """RandAugment in timm's notation; None for none."""
    color_jitter: float = 0.0
    """Brightness, contrast and saturation are multiplied by 1 ± this; only without RandAugment, as in timm."""
    erasing: float = 0.25
    """Chance that a random box is erased."""
    erasing_mode: Literal["pixel", "const"] = "pixel"
    """What an erased box is filled with: normal noise, or the mean colour."""
    mixup: float = 0.8
    """α of mixup's Beta(α, α); 0 for none."""
    cutmix: float = 1.0
    """α of cutmix's Beta(α, α); 0 for none."""
    mix_probability: float = 1.0
    """Chance that a batch is mixed at all."""
    switch_probability: float = 0.5
    """Chance of cutmix rather than mixup where both are on."""
    label_smoothing: float = 0.1
    """Share of the target spread over all classes."""

    def __post_init__(self) -> None:
        for name, allowed in (
            ("crop", ("resized", "pad", "none")),
            ("interpolation", ("bilinear", "bicubic")),
            ("erasing_mode", ("pixel", "const")),
        ):
            if getattr(self, name) not in allowed:
                raise UserError(f"augment {name}={getattr(self, name)!r}: allowed: {', '.join(allowed)}")
        for name in ("flip", "erasing", "mix_probability", "switch_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"augment {name}={getattr(self, name)}: must be between 0 and 1")
        for name in ("mixup", "cutmix", "color_jitter", "pad"):
            if getattr(self, name) < 0:
                raise UserError(f"augment {name}={getattr(self, name)}: must be 0 (off) or more")
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"augment label_smoothing={self.label_smoothing}: must be at least 0 and below 1")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise UserError(f"augment scale={self.scale}: must be two growing shares above 0 and at most 1")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise UserError(f"augment ratio={self.ratio}: must be two growing positive numbers")
        if self.rand_augment is not None:
            parse_rand_augment(self.rand_augment)
            if self.color_jitter:
                raise UserError(f"augment color_jitter={self.color_jitter}: only without rand_augment, set one of the two off")

    @classmethod
    def none(cls) -> "AugmentConfig":
        """The whole image, unflipped, with hard labels."""
        return cls(
            crop="none", flip=0.0, rand_augment=None, erasing=0.0, mixup=0.0, cutmix=0.0, label_smoothing=0.0
        )

    @property
    def mixes(self) -> bool:
        """Whether batches are mixed."""
        return self.mix_probability > 0 and (self.mixup > 0 or self.cutmix > 0)

    @property
    def soft_targets(self) -> bool:
        """Whether targets are (B, classes) rather than (B,)."""
        return self.mixes or self.label_smoothing > 0
