"""Images in class folders, as ImageNet is usually kept."""

import os
import warnings
from pathlib import Path

import numpy as np
from PIL import Image

from shiftaddvit.data.images import EXTENSIONS, open_rgb
from shiftaddvit.errors import UserError


def class_folders(root: Path) -> list[str]:
    """Names of the folders in `root`, sorted: the classes in the order of their labels, as in torchvision."""
    return sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))


class FolderImages:
    """`root/class/…/image.jpg`; the label is the class folder's place in `classes` (None: the sorted folders of `root`)."""

    def __init__(self, root: Path, classes: list[str] | None = None) -> None:
        found = class_folders(root)
        if not found:
            loose = sum(entry.name.lower().endswith(EXTENSIONS) for entry in os.scandir(root))
            if loose:
                raise UserError(f"{root}: holds {loose} images but no class folders; needs {root}/CLASS/image.jpg")
            raise UserError(f"{root}: is empty of images; needs {root}/CLASS/image.jpg, *.parquet or *.tar")
        self.root, self.classes = root, classes or found
        unknown = sorted(set(found) - set(self.classes))
        if unknown:
            raise UserError(f"{root}: class folder {unknown[0]!r} ({len(unknown)} such) is not among the training classes")
        label_of = {name: label for label, name in enumerate(self.classes)}
        paths, labels = [], []
        for name in found:
            images = sorted(
                os.path.relpath(os.path.join(folder, file), root)
                for folder, _, files in os.walk(root / name, followlinks=True)
                for file in files
                if file.lower().endswith(EXTENSIONS) and not file.startswith(".")
            )
            paths.extend(images)
            labels.extend([label_of[name]] * len(images))
        filled = set(labels)
        empty = [name for name in found if label_of[name] not in filled]
        if empty and paths:
            warnings.warn(f"{root}: {_named(empty)} no images ({', '.join(EXTENSIONS)})", stacklevel=2)
        if not paths:
            raise UserError(f"{root}: its {len(found)} class folders hold no images ({', '.join(EXTENSIONS)})")
        self._paths = np.array(paths)  # one array, not a million objects that each worker process would copy
        self.labels = np.array(labels, dtype=np.int64)
        self.blocks = None

    @property
    def keys(self) -> np.ndarray:
        """Paths inside `root`."""
        return self._paths

    def name(self, index: int) -> str:
        """The image's path."""
        return str(self.root / str(self._paths[index]))

    def image(self, index: int) -> Image.Image:
        """The decoded image."""
        return open_rgb(self.root / str(self._paths[index]))


def _named(folders: list[str]) -> str:
    """The first folders by name, and how many more there are, as the start of a sentence."""
    more = f" and {len(folders) - 5} more" if len(folders) > 5 else ""
    return f"class folder{'s' if len(folders) > 1 else ''} {', '.join(map(repr, folders[:5]))}{more} {'hold' if len(folders) > 1 else 'holds'}"
