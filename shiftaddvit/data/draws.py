"""Random numbers of augmented batches, drawn on the CPU so that they are the same on every device."""

import math
from dataclasses import dataclass

import numpy as np

from shiftaddvit.data.augment import AugmentConfig, RandAugment, parse_rand_augment

GEOMETRIC = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
LINEAR = ("invert", "brightness", "color", "contrast")
POINTWISE = ("autocontrast", "posterize", "solarize", "solarize_add", "equalize", "sharpness")
OPERATIONS = GEOMETRIC + LINEAR + POINTWISE
LUMA = np.array([0.299, 0.587, 0.114])


@dataclass(frozen=True)
class Draws:
    """Everything random about S batches of B images, except the noise in erased boxes."""

    theta: np.ndarray
    """(S, B, 2, 3) float32: output coordinates to source coordinates, both in [-1, 1]."""
    colour: np.ndarray
    """(S, B, 3, 7) float32: [M | P | b] of colour' = M colour + P mean colour + b, in units of 0 to 255."""
    pointwise: dict[str, np.ndarray]
    """For each operation its strengths (S, B) float32, NaN where it is not applied."""
    boxes: np.ndarray
    """(S, B, 4) int64: top, bottom, left, right of the erased box, empty where nothing is erased."""
    mix: list[tuple[float, tuple[int, int, int, int] | None]]
    """For each batch the share of the image itself, and the box (top, bottom, left, right) that cutmix takes, or None."""
    noise: list[int]
    """For each batch the seed of the noise in erased boxes."""


def draw(
    rng: np.random.Generator, steps: int, batch: int, config: AugmentConfig, source: tuple[int, int], size: tuple[int, int]
) -> Draws:
    """Draw `steps` batches at once; `source` and `size` are (height, width) in pixels of stored and produced images."""
    images = steps * batch
    theta = _crop(rng, images, config, source, size)
    colour = np.tile(np.eye(3, 7), (images, 1, 1))
    pointwise: dict[str, np.ndarray] = {}
    if config.color_jitter:
        factors = rng.uniform(max(0.0, 1 - config.color_jitter), 1 + config.color_jitter, (3, images))
        for name, factor in zip(("brightness", "contrast", "color"), factors, strict=True):
            colour = then_linear(colour, name, factor)
    if config.rand_augment is not None:
        policy = parse_rand_augment(config.rand_augment)
        pointwise = {name: np.full(images, np.nan) for name in POINTWISE}
        for _ in range(policy.rounds):
            operation = rng.integers(len(OPERATIONS), size=images)
            operation[rng.random(images) >= policy.probability] = -1
            if policy.deviation > 100:
                level = rng.uniform(0, policy.magnitude, images) / 10
            else:
                level = np.clip(rng.normal(policy.magnitude, policy.deviation, images), 0, 10) / 10
            sign = np.where(rng.random(images) < 0.5, -1.0, 1.0)
            for index, name in enumerate(OPERATIONS):
                rows = np.flatnonzero(operation == index)
                strength = strengths(name, level[rows], sign[rows], policy)
                if name in GEOMETRIC:
                    theta[rows] = then_affine(theta[rows], name, strength, size)
                elif name in LINEAR:
                    colour[rows] = then_linear(colour[rows], name, strength)
                else:
                    pointwise[name][rows] = strength
    return Draws(
        theta=theta.astype(np.float32).reshape(steps, batch, 2, 3),
        colour=colour.astype(np.float32).reshape(steps, batch, 3, 7),
        pointwise={name: value.astype(np.float32).reshape(steps, batch) for name, value in pointwise.items()},
        boxes=_erased_boxes(rng, images, config, size).reshape(steps, batch, 4),
        mix=[_mix(rng, config, size) for _ in range(steps)],
        noise=rng.integers(2**63, size=steps).tolist(),
    )


def strengths(name: str, level: np.ndarray, sign: np.ndarray, policy: RandAugment) -> np.ndarray:
    """What a level in [0, 1] means for an operation: degrees, shares, factors, thresholds or bits, in timm's ranges."""
    match name:
        case "rotate":
            return 30 * level * sign
        case "shear_x" | "shear_y":
            return 0.3 * level * sign
        case "translate_x" | "translate_y":
            return 0.45 * level * sign
        case "brightness" | "color" | "contrast" | "sharpness":
            return np.maximum(0.1, 1 + 0.9 * level * sign) if policy.increasing else 0.1 + 1.8 * level
        case "posterize":
            bits = np.floor(4 * level)
            return 4 - bits if policy.increasing else bits
        case "solarize":
            threshold = np.floor(256 * level)
            return 256 - threshold if policy.increasing else threshold
        case "solarize_add":
            return np.floor(110 * level)
        case _:  # invert, autocontrast and equalize have no strength
            return np.ones_like(level)


def _crop(rng: np.random.Generator, batch: int, config: AugmentConfig, source: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """Crop box and flip as maps (B, 2, 3) from output to source coordinates."""
    height, width = source
    half = np.ones((2, batch))  # half-size of the box, x and y, as a share of the source's
    centre = np.zeros((2, batch))
    if config.crop == "resized":
        area = rng.uniform(*config.scale, (10, batch)) * height * width
        ratio = np.exp(rng.uniform(math.log(config.ratio[0]), math.log(config.ratio[1]), (10, batch)))
        box = np.stack([np.sqrt(area * ratio) / width, np.sqrt(area / ratio) / height])  # (2, tries, B)
        fits = (box <= 1).all(0)
        first = fits.argmax(0)  # as in torchvision: the first of ten tries that fits, else the largest central box
        half = np.where(fits.any(0), box[:, first, np.arange(batch)], 1.0)
        centre = rng.uniform(-1, 1, (2, batch)) * (1 - half)
    elif config.crop == "pad":
        shift = rng.integers(-config.pad, config.pad + 1, (2, batch))
        centre = 2 * shift / np.array([[size[1]], [size[0]]])
    mirrored = np.where(rng.random(batch) < config.flip, -1.0, 1.0)
    theta = np.zeros((batch, 2, 3))
    theta[:, 0, 0] = half[0] * mirrored
    theta[:, 1, 1] = half[1]
    theta[:, :, 2] = centre.T
    return theta


def then_affine(theta: np.ndarray, name: str, strength: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Put one geometric operation, defined in pixels of the produced image, before the map to the source."""
    step = np.tile(np.eye(3), (len(strength), 1, 1))
    aspect = size[1] / size[0]
    if name == "rotate":
        angle = np.radians(strength)
        step[:, 0, 0] = step[:, 1, 1] = np.cos(angle)
        step[:, 0, 1] = -np.sin(angle) / aspect  # coordinates are shares of the width and of the height
        step[:, 1, 0] = np.sin(angle) * aspect
    elif name == "shear_x":
        step[:, 0, 1] = strength / aspect
    elif name == "shear_y":
        step[:, 1, 0] = strength * aspect
    else:
        step[:, 0 if name == "translate_x" else 1, 2] = 2 * strength
    return theta @ step


def then_linear(colour: np.ndarray, name: str, factor: np.ndarray) -> np.ndarray:
    """Apply one linear colour operation after the map `colour` (B, 3, 7) = [M | P | b]."""
    factor = factor[:, None, None]
    if name == "invert":
        return np.concatenate([-colour[..., :6], 255 - colour[..., 6:]], axis=-1)
    if name == "brightness":
        return factor * colour
    grey = np.broadcast_to(LUMA, (3, 3))
    if name == "color":  # blend with the grey image
        return factor * colour + (1 - factor) * (grey @ colour)
    # Contrast blends with the mean grey. The mean of M x + P μ + b is (M + P) μ + b: its M part moves into P.
    mean = grey @ colour
    mean = np.concatenate([np.zeros_like(mean[..., :3]), mean[..., :3] + mean[..., 3:6], mean[..., 6:]], axis=-1)
    return factor * colour + (1 - factor) * mean


def _erased_boxes(rng: np.random.Generator, batch: int, config: AugmentConfig, size: tuple[int, int]) -> np.ndarray:
    """Boxes of 2 % to a third of the image with aspect 0.3 to 3.3 (Zhong et al., 2020): the first of ten tries that fits."""
    if not config.erasing:
        return np.zeros((batch, 4), dtype=np.int64)
    height, width = size
    area = rng.uniform(0.02, 1 / 3, (10, batch)) * height * width
    ratio = np.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3), (10, batch)))
    tall, wide = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (tall < height) & (wide < width)
    chosen = fits.argmax(0), np.arange(batch)
    erased = fits.any(0) & (rng.random(batch) < config.erasing)
    tall, wide = np.where(erased, tall[chosen], 0), np.where(erased, wide[chosen], 0)
    top = np.floor(rng.random(batch) * (height - tall + 1))
    left = np.floor(rng.random(batch) * (width - wide + 1))
    return np.stack([top, top + tall, left, left + wide], axis=1).astype(np.int64)


def _mix(rng: np.random.Generator, config: AugmentConfig, size: tuple[int, int]) -> tuple[float, tuple[int, int, int, int] | None]:
    """One mixing share for the batch, and for cutmix a box whose true area sets that share (Yun et al., 2019)."""
    if not config.mixes or rng.random() >= config.mix_probability:
        return 1.0, None
    cut = config.cutmix > 0 and (config.mixup == 0 or rng.random() < config.switch_probability)
    alpha = config.cutmix if cut else config.mixup
    share = float(rng.beta(alpha, alpha))
    if not cut:
        return share, None
    height, width = size
    tall, wide = int(height * math.sqrt(1 - share)), int(width * math.sqrt(1 - share))
    y, x = int(rng.integers(height)), int(rng.integers(width))
    top, bottom = max(0, y - tall // 2), min(height, y + tall // 2)
    left, right = max(0, x - wide // 2), min(width, x + wide // 2)
    return 1 - (bottom - top) * (right - left) / (height * width), (top, bottom, left, right)
