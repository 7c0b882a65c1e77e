"""WebDataset shards: tar files in which neighbouring members of one name are a sample, `name.jpg` with `name.cls`."""

import os
import re
import tarfile
from collections import OrderedDict
from itertools import product
from pathlib import Path

import numpy as np
from PIL import Image

from shiftaddvit.data.images import EXTENSIONS, open_rgb
from shiftaddvit.errors import UserError

OPEN_FILES = 64  # shards kept open by each process


def expand_braces(pattern: str) -> list[str]:
    """`shard-{000..002}.tar` or `{a,b}.tar` to the names it stands for."""
    parts = re.split(r"\{([^{}]*)\}", pattern)
    choices: list[list[str]] = []
    for number, part in enumerate(parts):
        if number % 2 == 0:
            choices.append([part])
        elif span := re.fullmatch(r"(\d+)\.\.(\d+)", part):
            first, last = int(span[1]), int(span[2])
            if last < first:
                raise UserError(f"{pattern}: {{{part}}} runs backwards")
            choices.append([f"{value:0{len(span[1])}d}" for value in range(first, last + 1)])
        else:
            choices.append(part.split(","))
    return ["".join(chosen) for chosen in product(*choices)]


class TarImages:
    """Random access to the images of uncompressed tar shards.

    The headers of all shards are read once, so that the number of images and their order are known: an epoch can be shared among
    processes without leaving or repeating images, and be resumed in its middle. Image bytes are read when asked for.
    """

    def __init__(self, paths: list[Path]) -> None:
        self.paths = [Path(path) for path in paths]
        names: list[str] = []
        places: list[tuple[int, int, int]] = []
        labels: list[int] = []
        starts = []
        for shard, path in enumerate(self.paths):
            starts.append(len(places))
            for key, place, label in _samples(path):
                names.append(key)
                places.append((shard, *place))
                labels.append(label)
        if not places:
            raise UserError(f"{self.paths[0].parent}: the tar files hold no images with labels (name.jpg and name.cls)")
        self._names, self._places = np.array(names), np.array(places, dtype=np.int64)
        self.labels = np.array(labels, dtype=np.int64)
        if self.labels.min() < 0:
            raise UserError(f"{self.name(int(self.labels.argmin()))}: label {self.labels.min()} means unlabelled")
        self.classes = None
        self.blocks = None
        self._owner = os.getpid()
        self._open: OrderedDict[int, int] = OrderedDict()

    @property
    def keys(self) -> np.ndarray:
        """Keys of the samples."""
        return self._names

    def name(self, index: int) -> str:
        """Shard and key."""
        return f"{self.paths[self._places[index, 0]]}:{self._names[index]}"

    def image(self, index: int) -> Image.Image:
        """The decoded image."""
        shard, offset, size = (int(value) for value in self._places[index])
        return open_rgb(os.pread(self._descriptor(shard), size, offset))

    def _descriptor(self, shard: int) -> int:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        while len(self._open) >= OPEN_FILES:
            os.close(self._open.popitem(last=False)[1])
        self._open[shard] = os.open(self.paths[shard], os.O_RDONLY)
        return self._open[shard]

    def __del__(self) -> None:
        if getattr(self, "_owner", None) == os.getpid():
            for descriptor in self._open.values():
                os.close(descriptor)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_open": OrderedDict()}


def _samples(path: Path):
    """Yield (key, (offset, size) of the image, label) for each sample of one shard."""
    try:
        with open(path, "rb") as raw, tarfile.open(fileobj=raw, mode="r:") as archive:
            key, place, label = None, None, None
            for member in archive:
                if not member.isfile():
                    continue
                folder, _, base = member.name.rpartition("/")
                stem, _, extension = base.partition(".")
                if (folder, stem) != key:
                    if place is not None:
                        yield _checked(path, key, place, label)
                    key, place, label = (folder, stem), None, None
                extension = extension.lower().rpartition(".")[2]
                if f".{extension}" in EXTENSIONS:
                    place = (member.offset_data, member.size)
                elif extension == "cls":
                    text = archive.extractfile(member).read(32)
                    try:
                        label = int(text)
                    except ValueError:
                        raise UserError(f"{path}:{member.name}: label {text[:20]!r} is not a whole number") from None
            raw.seek(archive.offset)
            if raw.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # tarfile takes a missing end for an end
                raise tarfile.ReadError("unexpected end of data")
            if place is not None:
                yield _checked(path, key, place, label)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except tarfile.TarError as error:
        raise UserError(f"{path}: not a complete, uncompressed tar file ({error})") from None


def _checked(path: Path, key: tuple[str, str], place: tuple[int, int], label: int | None) -> tuple[str, tuple[int, int], int]:
    name = "/".join(filter(None, key))
    if label is None:
        raise UserError(f"{path}:{name}: has an image but no {name}.cls beside it")
    return name, place, label
