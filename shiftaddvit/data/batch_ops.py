"""Augmentation of whole batches with plain torch operations: no loop over images, no host synchronisation."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from shiftaddvit.data.draws import POINTWISE, Draws


@dataclass(frozen=True)
class Batch:
    """One batch of `Draws`, on the device."""

    theta: Float[Tensor, "B 2 3"] | None
    """Output coordinates to source coordinates; None where nothing moves."""
    colour: Float[Tensor, "B 3 7"] | None
    """[M | P | b] of colour' = M colour + P mean colour + b; None where no colour changes."""
    pointwise: dict[str, tuple[Int64[Tensor, "R"], Float[Tensor, "R 1 1 1"]]]
    """For each operation the rows it is applied to and its strengths there."""
    boxes: Int64[Tensor, "B 4"] | None
    """Erased boxes; None where nothing is erased."""
    mix: tuple[float, tuple[int, int, int, int] | None]
    """Share of the image itself, and cutmix's box or None."""
    noise: int
    """Seed of the noise in erased boxes."""


def batches(draws: Draws, device: torch.device) -> list[Batch]:
    """Copy all draws to the device at once, and cut them into batches there."""
    theta = None if (draws.theta == np.eye(2, 3)).all() else to_device(draws.theta, device)
    colour = None if (draws.colour == np.eye(3, 7)).all() else to_device(draws.colour, device)
    boxes = to_device(draws.boxes, device) if draws.boxes.any() else None
    pointwise: list[dict] = [{} for _ in draws.mix]
    for name, values in draws.pointwise.items():
        step, row = np.nonzero(~np.isnan(values))  # in order of steps
        ends = np.searchsorted(step, np.arange(len(draws.mix) + 1))
        rows, strengths = to_device(row, device), to_device(values[step, row], device).view(-1, 1, 1, 1)
        for number, (start, end) in enumerate(zip(ends, ends[1:])):
            if end > start:
                pointwise[number][name] = rows[start:end], strengths[start:end]
    return [
        Batch(
            theta=None if theta is None else theta[number],
            colour=None if colour is None else colour[number],
            pointwise=pointwise[number],
            boxes=None if boxes is None else boxes[number],
            mix=draws.mix[number],
            noise=draws.noise[number],
        )
        for number in range(len(draws.mix))
    ]


def augment(
    images: UInt8[Tensor, "B H W 3"],
    batch: Batch,
    size: tuple[int, int],
    fill: Float[Tensor, "1 3 1 1"],
    interpolation: str = "bilinear",
) -> Float[Tensor, "B 3 h w"]:
    """Crop, flip, RandAugment: pixels in [0, 255].

    All geometry is one sampling of the source, so a rotated image shows its surroundings rather than a border; only what lies
    outside the source is filled, with the colour `fill`. Geometry comes first, then colour; within each the order is fixed.
    """
    pixels = images.permute(0, 3, 1, 2).float()
    if batch.theta is not None:
        grid = F.affine_grid(batch.theta, [len(images), 3, *size], align_corners=False)
        pixels = F.grid_sample(pixels - fill, grid, mode=interpolation, padding_mode="zeros", align_corners=False)
        pixels = pixels.add_(fill).clamp_(0, 255)
    elif images.shape[1:3] != size:
        pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True).clamp_(0, 255)
    for name in POINTWISE:
        if name == POINTWISE[1] and batch.colour is not None:  # after autocontrast, before what depends on values
            pixels = linear_colour(pixels, batch.colour)
        if name in batch.pointwise:
            rows, strength = batch.pointwise[name]
            pixels = pixels.index_copy(0, rows, OPERATION[name](pixels.index_select(0, rows), strength))
    return pixels


def linear_colour(pixels: Float[Tensor, "B 3 H W"], colour: Float[Tensor, "B 3 7"]) -> Float[Tensor, "B 3 H W"]:
    """colour' = M colour + P mean colour + b for each image, clipped to [0, 255]; `colour` is [M | P | b]."""
    matrix, of_mean, bias = colour.split((3, 3, 1), dim=-1)
    flat = pixels.flatten(2)
    bias = torch.baddbmm(bias, of_mean, flat.mean(2, keepdim=True))
    return torch.baddbmm(bias, matrix, flat).clamp_(0, 255).view_as(pixels)


def autocontrast(pixels: Float[Tensor, "R 3 H W"], strength: Float[Tensor, "R 1 1 1"]) -> Float[Tensor, "R 3 H W"]:
    """Stretch each channel to [0, 255]; a constant channel stays."""
    low, high = torch.aminmax(pixels.flatten(2), dim=2)
    low, high = low[..., None, None], high[..., None, None]
    return torch.where(high > low, (pixels - low) * (255 / (high - low).clamp_min(1e-6)), pixels)


def posterize(pixels: Float[Tensor, "R 3 H W"], bits: Float[Tensor, "R 1 1 1"]) -> Float[Tensor, "R 3 H W"]:
    """Keep the `bits` leading bits."""
    step = torch.exp2(8 - bits)
    return torch.floor(torch.round(pixels) / step) * step


def solarize(pixels: Float[Tensor, "R 3 H W"], threshold: Float[Tensor, "R 1 1 1"]) -> Float[Tensor, "R 3 H W"]:
    """Invert what is at or above the threshold."""
    return torch.where(pixels >= threshold, 255 - pixels, pixels)


def solarize_add(pixels: Float[Tensor, "R 3 H W"], added: Float[Tensor, "R 1 1 1"]) -> Float[Tensor, "R 3 H W"]:
    """Brighten what is below 128."""
    return torch.where(pixels < 128, (pixels + added).clamp_max(255), pixels)


def equalize(pixels: Float[Tensor, "R 3 H W"], strength: Float[Tensor, "R 1 1 1"]) -> Float[Tensor, "R 3 H W"]:
    """Flatten each channel's histogram, by the integer rule of Pillow's `ImageOps.equalize`."""
    values = torch.round(pixels).long().flatten(2).flatten(0, 1)  # (3R, HW)
    histogram = torch.zeros(len(values), 256, dtype=torch.long, device=pixels.device)
    histogram.scatter_add_(1, values, torch.ones_like(values))
    levels = torch.arange(256, device=pixels.device)
    brightest = torch.where(histogram > 0, levels, -1).amax(1, keepdim=True)
    step = (values.shape[1] - histogram.gather(1, brightest)) // 255
    below = histogram.cumsum(1) - histogram
    table = torch.where(step > 0, ((step // 2 + below) // step.clamp_min(1)).clamp_max(255), levels)
    return table.gather(1, values).view(pixels.shape).to(pixels.dtype)


def sharpness(pixels: Float[Tensor, "R 3 H W"], factor: Float[Tensor, "R 1 1 1"]) -> Float[Tensor, "R 3 H W"]:
    """Blend with a smoothed image whose one-pixel border is left as it is."""
    kernel = torch.ones(3, 1, 3, 3, device=pixels.device, dtype=pixels.dtype) / 13
    kernel[:, :, 1, 1] *= 5
    smooth = pixels.clone()
    smooth[:, :, 1:-1, 1:-1] = F.conv2d(pixels, kernel, groups=3)
    return torch.lerp(smooth, pixels, factor).clamp_(0, 255)


def erase(
    images: Float[Tensor, "B 3 H W"], boxes: Int64[Tensor, "B 4"], mode: str, noise: torch.Generator
) -> Float[Tensor, "B 3 H W"]:
    """Fill one box in each normalised image with normal noise (`pixel`) or with the mean (`const`)."""
    top, bottom, left, right = boxes[:, :, None, None].unbind(1)  # each (B, 1, 1)
    row = torch.arange(images.shape[2], device=images.device)[:, None]
    column = torch.arange(images.shape[3], device=images.device)
    inside = ((row >= top) & (row < bottom) & (column >= left) & (column < right)).unsqueeze(1)
    if mode == "const":
        return images.masked_fill(inside, 0.0)
    filled = torch.empty_like(images).normal_(generator=noise)
    return torch.where(inside, filled, images)


def mix(images: Float[Tensor, "B 3 H W"], share: float, box: tuple[int, int, int, int] | None) -> Float[Tensor, "B 3 H W"]:
    """Mix each image with the one mirrored in batch order: blended (mixup), or a box taken from it (cutmix)."""
    if box is not None:
        top, bottom, left, right = box
        mixed = images.clone()
        mixed[:, :, top:bottom, left:right] = images.flip(0)[:, :, top:bottom, left:right]
        return mixed
    return images if share == 1.0 else torch.lerp(images.flip(0), images, share)


def to_device(values: np.ndarray, device: torch.device) -> Tensor:
    """Copy a small array without waiting for the device: pinned memory keeps the queue of kernels running."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


OPERATION: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "autocontrast": autocontrast,
    "posterize": posterize,
    "solarize": solarize,
    "solarize_add": solarize_add,
    "equalize": equalize,
    "sharpness": sharpness,
}

