"""Decode a data set once into one array of bytes, for the resident loader."""

import os
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from shiftaddvit.data.images import open_rgb
from shiftaddvit.data.parquet import ParquetImages

CHUNK = 256  # images a task: large enough that passing tasks to processes costs nothing


def decode_parquet(
    paths: list[str | os.PathLike] | str | os.PathLike, size: int | tuple[int, int], *, workers: int | None = None
) -> tuple[UInt8[np.ndarray, "N H W 3"], Int64[np.ndarray, "N"]]:
    """Decode the images of Parquet files in hub layout; see `decode`."""
    paths = [paths] if isinstance(paths, (str, os.PathLike)) else paths
    return decode(ParquetImages([Path(path) for path in paths]), size, workers=workers)


def decode(
    images: ParquetImages, size: int | tuple[int, int], *, workers: int | None = None
) -> tuple[UInt8[np.ndarray, "N H W 3"], Int64[np.ndarray, "N"]]:
    """Decode every image, in order, over `workers` processes (None: one for each available core; 0: in this one).

    Images of another size are resized so that they cover `size` (Pillow's bicubic) and cut to it at the centre.
    """
    size = (size, size) if isinstance(size, int) else tuple(size)
    workers = len(os.sched_getaffinity(0)) if workers is None else workers
    chunks = _Chunks(images, size)
    pixels = np.empty((len(images), *size, 3), dtype=np.uint8)
    loader = DataLoader(chunks, batch_size=None, num_workers=min(workers, len(chunks)), prefetch_factor=2 if workers else None)
    for number, decoded in enumerate(loader):
        pixels[number * CHUNK : number * CHUNK + len(decoded)] = decoded.numpy()
    return pixels, np.asarray(images.labels)


def fit(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resize to cover (height, width) and cut the centre."""
    height, width = size
    if image.size == (width, height):
        return image
    scale = max(width / image.width, height / image.height)
    image = image.resize((max(width, round(image.width * scale)), max(height, round(image.height * scale))), Image.Resampling.BICUBIC)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


class _Chunks(Dataset):
    """Runs of `CHUNK` images as uint8 tensors."""

    def __init__(self, images: ParquetImages, size: tuple[int, int]) -> None:
        self.images, self.size = images, size

    def __len__(self) -> int:
        return -(-len(self.images) // CHUNK)

    def __getitem__(self, number: int) -> torch.Tensor:
        indices = range(number * CHUNK, min((number + 1) * CHUNK, len(self.images)))
        return torch.from_numpy(np.stack([np.asarray(fit(open_rgb(self.images.encoded(i)), self.size)) for i in indices]))
