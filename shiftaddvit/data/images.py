"""What every image data set here has in common: images at random access, and what happens to one that cannot be read."""

import hashlib
import io
import zlib
from pathlib import Path
from struct import error as StructError
from typing import Any, Protocol, runtime_checkable

import numpy as np
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset

from shiftaddvit.data.order import Blocks
from shiftaddvit.errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff")
REPLACEMENTS_TRIED = 100  # so many neighbours unreadable in a row are no accident


def open_rgb(source: bytes | Path) -> Image.Image:
    """Decode an image, completely, to RGB. Raises one of the errors that `ImageData.read` turns into `Unreadable`."""
    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
        return image.convert("RGB")


class Unreadable(UserError):
    """An image that cannot be decoded."""


@runtime_checkable
class ImageStore(Protocol):
    """Labelled images at random access, decoded when asked for and never kept."""

    labels: np.ndarray
    """(N,) int64, 0 and up."""
    classes: list[str] | None
    """Name of each label."""
    blocks: Blocks | None
    """How images are stored together, where it matters for speed; None where any order is as good."""

    def image(self, index: int) -> Image.Image:
        """The decoded image."""
        ...

    def name(self, index: int) -> str:
        """What a message calls this image."""
        ...


class ImageData(Dataset):
    """Images and labels of one split: `data[i]` is `(image, label)`, a Pillow RGB image and an int.

    An image that cannot be read is replaced by the next one that can, and remembered in `unreadable`, index to reason;
    with `strict` it raises `Unreadable`, naming it.
    """

    def __init__(self, store: ImageStore, *, strict: bool = False) -> None:
        self.store, self.strict = store, strict
        self.unreadable: dict[int, str] = {}

    @property
    def classes(self) -> list[str] | None:
        """Name of each label, where the data say."""
        return self.store.classes

    @property
    def labels(self) -> np.ndarray:
        """(N,) int64."""
        return self.store.labels

    @property
    def num_classes(self) -> int:
        """Number of classes: of the names, else of the labels used."""
        return len(self.classes) if self.classes is not None else int(self.labels.max()) + 1

    def identity(self) -> dict[str, Any]:
        """What tells these images from others without reading them: their number, the classes' names, and a digest of the labels and, where
        images have names of their own, of those, in the order of the data. Where the data lie does not matter."""
        digest = hashlib.sha256(np.ascontiguousarray(self.labels).tobytes())
        digest.update("\0".join(map(str, getattr(self.store, "keys", ()))).encode(errors="surrogateescape"))
        return {"number": len(self), "classes": self.classes and list(self.classes), "digest of labels and names": digest.hexdigest()[:16]}

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> Image.Image:
        """The image itself. Raises `Unreadable`."""
        try:
            return self.store.image(index)
        except (OSError, ValueError, SyntaxError, EOFError, StructError, zlib.error, Image.DecompressionBombError) as error:
            # Pillow names the buffer in memory, which says nothing.
            unknown = isinstance(error, UnidentifiedImageError)
            reason = "no image of a known format" if unknown else (str(error) or type(error).__name__).splitlines()[0]
            raise Unreadable(f"cannot read image {self.store.name(index)}: {reason}") from None

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        image, found = self.read_or_next(index)
        return image, int(self.labels[found])

    def read_or_next(self, index: int) -> tuple[Image.Image, int]:
        """The image at `index`, else the next readable one, and the index it has."""
        first = None
        for step in range(min(REPLACEMENTS_TRIED, len(self))):
            found = (index + step) % len(self)
            try:
                return self.read(found), found
            except Unreadable as error:
                if self.strict:
                    raise
                self.unreadable[found] = str(error)
                first = first or error
        raise Unreadable(f"{first}; nor can any of the next {min(REPLACEMENTS_TRIED, len(self)) - 1} images be read")
