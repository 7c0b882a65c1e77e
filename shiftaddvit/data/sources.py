"""Opening a data set by path or name, in whichever of four forms it comes."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from timm.data import create_dataset
from torch.utils.data import Dataset

from shiftaddvit.data.folder import FolderImages, class_folders
from shiftaddvit.data.images import ImageData, ImageStore
from shiftaddvit.data.parquet import ParquetImages
from shiftaddvit.data.tar import TarImages, expand_braces
from shiftaddvit.errors import UserError, unknown

SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "test"),
    "test": ("test",),
}
"""Names that stand for a split in folders and files, the better first: where there is no validation split, test serves."""

TORCH_NAMES = ("cifar10", "cifar100", "mnist", "kmnist", "fashion_mnist", "qmnist", "places365", "inaturalist", "imagenet")


def open_dataset(
    path_or_name: str | os.PathLike, split: str, *, strict: bool = False, root: str | os.PathLike | None = None, download: bool = False
) -> ImageData:
    """Open one split (`train`, `val` or `test`) of an image data set.

    Args:
        path_or_name: one of
            a folder of class folders, or one with `train/` and `val/` of them (ImageNet as people have it);
            a Parquet file, or a folder of them in hub layout (`train-*.parquet`, `val*`, `validation*`, `test*`);
            a tar file, a folder of them, or a pattern such as `train-{000..146}.tar` (WebDataset);
            a timm name: `torch/cifar10`, `hfds/owner/name`.
        strict: stop at an image that cannot be read, instead of taking the next one and counting it.
        root: where a named data set lies (timm names only).
        download: whether a named data set may be fetched when it is not there.

    Raises:
        UserError: no such data set or split, an empty folder, a folder without classes, files of another layout.
    """
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    text, path = os.fspath(path_or_name), Path(path_or_name)
    if "{" in text and text.endswith(".tar"):
        return ImageData(TarImages([Path(name) for name in expand_braces(text)]), strict=strict)
    if path.is_file():
        return ImageData(_from_files([path]), strict=strict)
    if path.is_dir():
        return ImageData(_from_folder(path, split), strict=strict)
    if text.partition("/")[0] in ("torch", "hfds"):
        return ImageData(_from_timm(text, split, root, download), strict=strict)
    if text.partition("/")[0] in ("tfds", "wds", "hfids"):
        raise UserError(f"dataset {text!r}: streams cannot be resumed or counted; export it to Parquet, tar or class folders")
    raise UserError(f"unknown dataset {text!r}: no such file or folder; also allowed: torch/NAME, hfds/OWNER/NAME, a .tar pattern with {{000..999}}")


class NoSplit(UserError):
    """Data that have other splits, but not the one that is wanted."""


def check_classes(data: ImageData, outputs: int) -> None:
    """Raise `UserError` unless every label of the data has an output of the model."""
    if data.num_classes > outputs or (data.classes is not None and data.num_classes != outputs):
        raise UserError(f"the data have {data.num_classes} classes but the model {outputs} outputs: they must agree (num_classes of the model, --num-classes of a command)")


def check_class_names(data: ImageData, names: Sequence[str] | None, source: str, others_allowed: bool = False) -> None:
    """Raise `UserError` unless label by label the data's classes are called `names`, as the model's file `source` says. The same names in
    another order are never right; other names are with `others_allowed`. Without names on either side, or as many, nothing is compared."""
    if data.classes is None or names is None or len(names) != len(data.classes):
        return
    differing = [label for label, pair in enumerate(zip(names, data.classes, strict=True)) if pair[0] != pair[1]]
    if not differing:
        return
    label = differing[0]
    first = f"label {label} is {names[label]!r} in {source} and {data.classes[label]!r} in the data; {len(differing)} of {len(names)} differ"
    if sorted(names) == sorted(data.classes):
        raise UserError(f"the data have the model's classes in another order: {first}")
    if not others_allowed:
        raise UserError(f"the data's classes are not the model's: {first}; if these are other names for the same, add --ignore-class-names")


def _from_folder(root: Path, split: str) -> ImageStore:
    for folder in (root, root / "data"):  # the hub keeps its files in `data/`
        files = sorted(file for file in folder.glob("*") if file.suffix in (".parquet", ".tar")) if folder.is_dir() else []
        if files:
            return _from_files(_of_split(files, split, folder))
    folders = class_folders(root)
    named = {name.lower(): name for name in folders}
    known = {word for words in SPLITS.values() for word in words} & set(named)
    if not known:
        return FolderImages(root)
    wanted = next((named[word] for word in SPLITS[split] if word in named), None)
    if wanted is None:
        raise NoSplit(f"{root}: has no split {split!r}; it has {', '.join(sorted(known))}")
    inside = root / wanted
    files = sorted(file for file in inside.glob("*") if file.suffix in (".parquet", ".tar"))
    if files:
        return _from_files(files)
    training = next((root / named[word] for word in SPLITS["train"] if word in named), None)
    classes = class_folders(training) if training is not None else []
    return FolderImages(inside, classes or None)  # labels of every split are those of training, whatever is missing


def _of_split(files: list[Path], split: str, folder: Path) -> list[Path]:
    """Those files whose name says that they belong to the split; all of them where no name says anything."""
    by_word: dict[str, list[Path]] = {}
    for file in files:
        words = set(re.split(r"[^a-z]+", file.stem.lower()))
        for word in {word for names in SPLITS.values() for word in names} & words:
            by_word.setdefault(word, []).append(file)
    if not by_word:
        return files
    for word in SPLITS[split]:
        if word in by_word:
            return by_word[word]
    raise NoSplit(f"{folder}: has no files of split {split!r}; it has {', '.join(sorted(by_word))}")


def _from_files(files: list[Path]) -> ImageStore:
    kinds = {file.suffix for file in files}
    if kinds == {".parquet"}:
        store = ParquetImages(files)
        listing = files[0].parent / "classes.txt"
        if store.classes is None and listing.is_file():  # one name a line, an identifier before a tab is left out
            store.classes = [line.rpartition("\t")[2] for line in listing.read_text().splitlines()]
        return store
    if kinds == {".tar"}:
        return TarImages(files)
    raise UserError(f"{files[0]}: is a {'/'.join(sorted(kinds)) or 'file'}; a data set is .parquet, .tar or a folder of class folders")


def _from_timm(name: str, split: str, root: str | os.PathLike | None, download: bool) -> "TimmImages":
    kind, _, rest = name.partition("/")
    if kind == "torch" and rest not in TORCH_NAMES:
        raise unknown("dataset", name, [f"torch/{known}" for known in TORCH_NAMES])
    if kind == "torch" and root is None:
        raise UserError(f"dataset {name!r}: say in which folder it lies (root)")
    timm_split = {"val": "validation"}.get(split, split)
    try:
        return TimmImages(create_dataset(name, root=root, split=timm_split, download=download))
    except ImportError as error:
        raise UserError(f"dataset {name!r}: needs a package that is not installed ({error})") from None
    except (RuntimeError, OSError, ValueError, AssertionError) as error:
        hint = "" if download else "; allow the download, or name the folder that holds it"
        raise UserError(f"dataset {name!r} in {root}: {str(error).splitlines()[0] if str(error) else type(error).__name__}{hint}") from None


class TimmImages:
    """A data set of timm or torchvision, which decodes for itself."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset
        targets = getattr(dataset, "targets", None)
        if targets is None:
            targets = [dataset[index][1] for index in range(len(dataset))]
        self.labels = np.asarray(targets, dtype=np.int64)
        names = getattr(dataset, "classes", None)
        self.classes = [str(name) for name in names] if names else None
        self.blocks = None

    def name(self, index: int) -> str:
        """Number of the image."""
        return f"{type(self._dataset).__name__} {index}"

    def image(self, index: int) -> Image.Image:
        """The decoded image."""
        return self._dataset[index][0].convert("RGB")
