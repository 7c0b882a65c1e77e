"""Reading and writing pictures: one size a scene, upright, RGB; lens distortion undone."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from shiftaddvit.errors import UserError
from shiftaddvit.files import atomic_write

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp")


def list_pictures(folder: str | os.PathLike) -> list[Path]:
    """The pictures of a folder, sorted by name."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and not path.name.startswith("."))


def open_picture(path: str | os.PathLike) -> Image.Image:
    """One picture, fully decoded, turned upright, on white where it is transparent."""
    try:
        with Image.open(path) as image:
            image.load()
            image = ImageOps.exif_transpose(image)
    except FileNotFoundError:
        raise UserError(f"{path}: no such picture") from None
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: cannot be read as a picture ({error}); is the file truncated?") from None
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def picture_size(path: str | os.PathLike) -> tuple[int, int]:
    """(height, width) after turning upright, from the header alone."""
    try:
        with Image.open(path) as image:
            turned = image.getexif().get(274, 1) >= 5
            return image.size if turned else (image.height, image.width)
    except (UnidentifiedImageError, OSError) as error:
        raise UserError(f"{path}: cannot be read as a picture ({error})") from None


def read_pictures(
    paths: Sequence[str | os.PathLike], width: int | None = None
) -> tuple[UInt8[Tensor, "N H W 3"], tuple[int, int]]:
    """Pictures as one tensor, area-averaged down to `width` if given, and their (height, width) before that.

    Mixed sizes raise `UserError` naming the first picture that differs, so does a picture narrower than `width`.
    """
    if not paths:
        raise UserError("no pictures to read")
    arrays, size, first = [], None, paths[0]
    for path in paths:
        image = open_picture(path)
        if size is None:
            size = (image.height, image.width)
        elif size != (image.height, image.width):
            raise UserError(
                f"{path}: {image.width}×{image.height} pixels, but {first} has {size[1]}×{size[0]}; all pictures must have one size"
            )
        if width is not None and width != image.width:
            if not 8 <= width <= image.width:
                raise UserError(f"{path}: width {width} asked of a picture {image.width} wide; allowed: 8 to {image.width}")
            image = image.resize((width, max(1, round(image.height * width / image.width))), Image.Resampling.BOX)
        arrays.append(torch.from_numpy(np.array(image, dtype=np.uint8)))
    return torch.stack(arrays), size


def write_png(path: str | os.PathLike, image: Float[Tensor, "H W 3"] | UInt8[Tensor, "H W 3"]) -> None:
    """Write a picture with values in [0, 1] (or bytes) as PNG, atomically."""
    with atomic_write(path) as temporary:
        Image.fromarray(to_bytes(image).cpu().numpy()).save(temporary, format="PNG")


def write_jpeg(path: str | os.PathLike, image: Float[Tensor, "H W 3"] | UInt8[Tensor, "H W 3"], quality: int = 95) -> None:
    """Write a picture with values in [0, 1] (or bytes) as JPEG, atomically."""
    with atomic_write(path) as temporary:
        Image.fromarray(to_bytes(image).cpu().numpy()).save(temporary, format="JPEG", quality=quality, subsampling=0)


def to_bytes(image: Float[Tensor, "*n"] | UInt8[Tensor, "*n"]) -> UInt8[Tensor, "*n"]:
    """[0, 1] to 0…255, rounded; bytes pass."""
    if image.dtype == torch.uint8:
        return image
    return (image.float().clamp(0, 1) * 255 + 0.5).to(torch.uint8)


def undistort(
    images: UInt8[Tensor, "N H W 3"],
    intrinsics: Float[Tensor, "3 3"],
    coefficients: tuple[float, float, float, float],
) -> UInt8[Tensor, "N H W 3"]:
    """Pictures as a pinhole camera with the same intrinsics would have taken them.

    `coefficients` are k1, k2, p1, p2 of the OpenCV (Brown) model, x_d = x(1 + k1 r² + k2 r⁴) + 2 p1 xy + p2 (r² + 2x²). Pixels that the
    lens did not see repeat the border.
    """
    if not any(coefficients):
        return images
    k1, k2, p1, p2 = coefficients
    height, width = images.shape[1:3]
    fx, fy, cx, cy = intrinsics[0, 0], intrinsics[1, 1], intrinsics[0, 2], intrinsics[1, 2]
    y, x = torch.meshgrid(
        (torch.arange(height, dtype=torch.float64) - cy) / fy, (torch.arange(width, dtype=torch.float64) - cx) / fx, indexing="ij"
    )
    square = x * x + y * y
    radial = 1 + square * (k1 + k2 * square)
    seen_x = x * radial + 2 * p1 * x * y + p2 * (square + 2 * x * x)
    seen_y = y * radial + p1 * (square + 2 * y * y) + 2 * p2 * x * y
    grid = torch.stack([2 * (seen_x * fx + cx) / (width - 1) - 1, 2 * (seen_y * fy + cy) / (height - 1) - 1], dim=-1)
    out = torch.empty_like(images)
    for number, image in enumerate(images):
        planes = image.permute(2, 0, 1)[None].float()
        sampled = F.grid_sample(planes, grid[None].float(), mode="bilinear", padding_mode="border", align_corners=True)
        out[number] = (sampled[0].permute(1, 2, 0) + 0.5).clamp(0, 255).to(torch.uint8)
    return out
