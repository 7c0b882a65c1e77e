"""Decode a data set once into one array of bytes, for the resident loader."""

import os
import warnings
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from shiftaddvit.data.images import ImageData, Unreadable
from shiftaddvit.data.parquet import ParquetImages
from shiftaddvit.errors import UserError
from shiftaddvit.files import atomic_write

CHUNK = 256  # images a task: large enough that passing tasks to processes costs nothing


def decode_parquet(
    paths: list[str | os.PathLike] | str | os.PathLike, size: int | tuple[int, int], *, workers: int | None = None
) -> tuple[UInt8[np.ndarray, "N H W 3"], Int64[np.ndarray, "N"]]:
    """Decode the images of Parquet files in hub layout; see `decode`."""
    paths = [paths] if isinstance(paths, (str, os.PathLike)) else paths
    return decode(ImageData(ParquetImages([Path(path) for path in paths])), size, workers=workers)


def decode(
    data: ImageData, size: int | tuple[int, int], *, workers: int | None = None, cache: str | os.PathLike | None = None
) -> tuple[UInt8[np.ndarray, "N H W 3"], Int64[np.ndarray, "N"]]:
    """Decode every image, in order, over `workers` processes (None: one for each available core; 0: in this one).

    Images of another size are resized so that they cover `size` (Pillow's bicubic) and cut to it at the centre. Images that cannot
    be read are left out with one warning, or raise `Unreadable` where the data are `strict`.

    Args:
        cache: an .npy file to read the result from, or to write it to when there is none; it holds records of image, label and index.

    Raises:
        UserError: the cache holds other images than `data`, or not one image can be read.
    """
    size = (size, size) if isinstance(size, int) else tuple(size)
    if cache is not None and Path(cache).exists():
        return _from_cache(Path(cache), data, size)
    workers = len(os.sched_getaffinity(0)) if workers is None else workers
    chunks = _Chunks(data, size)
    loader = DataLoader(
        chunks, batch_size=None, num_workers=min(workers, len(chunks)), generator=torch.Generator(), prefetch_factor=2 if workers else None
    )
    pixels = np.empty((len(data), *size, 3), dtype=np.uint8)
    failures: dict[int, str] = {}
    for number, (decoded, failed) in enumerate(loader):
        pixels[number * CHUNK : number * CHUNK + len(decoded)] = decoded.numpy()
        failures |= failed
        if failed and data.strict:
            raise Unreadable(next(iter(failed.values())))
    index = np.setdiff1d(np.arange(len(data)), list(failures))
    if failures:
        first = next(iter(failures.values()))
        if len(index) == 0:
            raise Unreadable(f"none of the {len(data)} images can be read, such as: {first}")
        warnings.warn(f"{len(failures)} of {len(data)} images could not be read and were left out, such as: {first}", stacklevel=2)
        pixels = pixels[index]
    labels = data.labels[index]
    if cache is not None:
        _to_cache(Path(cache), pixels, labels, index)
    return pixels, labels


class Fit:
    """Resize a Pillow image to cover (height, width), and cut its centre."""

    def __init__(self, size: tuple[int, int]) -> None:
        self.height, self.width = size

    def __call__(self, image: Image.Image) -> Image.Image:
        if image.size == (self.width, self.height):
            return image
        scale = max(self.width / image.width, self.height / image.height)
        larger = max(self.width, round(image.width * scale)), max(self.height, round(image.height * scale))
        image = image.resize(larger, Image.Resampling.BICUBIC)
        left, top = (image.width - self.width) // 2, (image.height - self.height) // 2
        return image.crop((left, top, left + self.width, top + self.height))


class _Chunks(Dataset):
    """Runs of `CHUNK` images as uint8 tensors, with the reasons for those that could not be read."""

    def __init__(self, data: ImageData, size: tuple[int, int]) -> None:
        self.data, self.size, self.fit = data, size, Fit(size)

    def __len__(self) -> int:
        return -(-len(self.data) // CHUNK)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, dict[int, str]]:
        indices = range(number * CHUNK, min((number + 1) * CHUNK, len(self.data)))
        pixels = torch.zeros(len(indices), *self.size, 3, dtype=torch.uint8)
        failed: dict[int, str] = {}
        for place, index in enumerate(indices):
            try:
                pixels[place] = torch.from_numpy(np.array(self.fit(self.data.read(index))))
            except Unreadable as error:
                failed[index] = str(error)
        return pixels, failed


def _record(size: tuple[int, int]) -> np.dtype:
    return np.dtype([("image", "u1", (*size, 3)), ("label", "<i8"), ("index", "<i8")])


def _to_cache(cache: Path, pixels: np.ndarray, labels: np.ndarray, index: np.ndarray) -> None:
    with atomic_write(cache) as temporary:
        records = np.lib.format.open_memmap(temporary, mode="w+", dtype=_record(pixels.shape[1:3]), shape=(len(pixels),))
        records["image"], records["label"], records["index"] = pixels, labels, index
        records.flush()


def _from_cache(cache: Path, data: ImageData, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    try:
        records = np.load(cache, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"{cache}: not a complete cache of decoded images ({str(error).splitlines()[0]}); delete it") from None
    if records.dtype != _record(size):
        raise UserError(f"{cache}: does not hold images of {size[0]}×{size[1]}; name another cache or delete it")
    labels, index = np.array(records["label"]), records["index"]
    if len(index) > len(data) or index.max() >= len(data) or not np.array_equal(labels, data.labels[index]):
        raise UserError(f"{cache}: holds other images than the data given; name another cache or delete it")
    return np.array(records["image"]), labels
