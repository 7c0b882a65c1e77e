"""Images in Parquet files in the layout of the Hugging Face hub: `image: {bytes, path}` and `label`."""

import json
import os
from bisect import bisect_right
from collections import OrderedDict
from pathlib import Path

import numpy as np
from PIL import Image

from shiftaddvit.data.images import open_rgb
from shiftaddvit.data.order import Blocks
from shiftaddvit.errors import UserError


def parquet_module():
    """pyarrow.parquet, which is an optional dependency."""
    try:
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise UserError("reading Parquet needs pyarrow: pip install 'shiftaddvit[data]'") from None
    return pyarrow.parquet


class ParquetImages:
    """Random access to the encoded images of Parquet files; decoded images are never kept.

    Row groups are read whole and the latest few are kept, encoded, up to `cache_bytes`. Where the data exceed that, `blocks`
    says where row groups start, so that a shuffle can stay among a few of them at a time.
    """

    def __init__(self, paths: list[Path], *, cache_bytes: int = 1 << 28) -> None:
        if not paths:
            raise UserError("no Parquet files given")
        pq = parquet_module()
        self.paths, self.cache_bytes = [Path(path) for path in paths], cache_bytes
        self.classes: list[str] | None = None
        labels, starts = [], []
        self._groups: list[tuple[int, int]] = []  # (file, row group in it)
        stored = rows = 0
        for which, path in enumerate(self.paths):
            try:
                file = pq.ParquetFile(path)
            except (OSError, ValueError) as error:  # pyarrow's ArrowInvalid is a ValueError
                raise UserError(f"{path}: not a Parquet file ({str(error).splitlines()[0]})") from None
            schema = file.schema_arrow
            columns = {file.schema.column(number).path for number in range(len(file.schema))}
            if not {"image.bytes", "label"} <= columns:
                raise UserError(f"{path}: has columns {', '.join(schema.names)}; needs image {{bytes, path}} and label")
            column = file.read(["label"]).column("label")
            if column.null_count or column.to_numpy().dtype.kind not in "iu":
                raise UserError(f"{path}: labels are {column.type} with {column.null_count} missing; must be whole numbers, all there")
            labels.append(column.to_numpy().astype(np.int64))
            for group in range(file.metadata.num_row_groups):
                starts.append(rows)
                rows += file.metadata.row_group(group).num_rows
                stored += file.metadata.row_group(group).total_byte_size
                self._groups.append((which, group))
            self.classes = self.classes or _class_names(schema.metadata or {})
        self.labels = np.concatenate(labels)
        if len(self.labels) == 0:
            raise UserError(f"{self.paths[0].parent}: the Parquet files hold no images")
        if self.labels.min() < 0:
            raise UserError(f"{self.paths[0].parent}: label {self.labels.min()} means unlabelled, a split with labels is needed")
        self._starts = starts
        self.blocks = Blocks(np.array(starts), max(1, cache_bytes * len(starts) // stored)) if stored > cache_bytes else None
        self._files: dict[int, object] = {}
        self._owner = os.getpid()
        self._cache: OrderedDict[int, tuple[object, int]] = OrderedDict()

    @property
    def keys(self) -> list[str]:
        """Names of the files."""
        return [path.name for path in self.paths]

    def name(self, index: int) -> str:
        """File, row and the path the image once had."""
        group, row = self._locate(index)
        number, inside = self._groups[group]
        name = f"{self.paths[number]} row {self._starts[group] - self._starts[group - inside] + row}"
        path = self._cache[group][0][row].as_py().get("path") if group in self._cache else None
        return f"{name} ({path})" if path else name

    def image(self, index: int) -> Image.Image:
        """The decoded image."""
        group, row = self._locate(index)
        return open_rgb(self._group(group).field("bytes")[row].as_py() or b"")

    def _locate(self, index: int) -> tuple[int, int]:
        group = bisect_right(self._starts, index) - 1
        return group, index - self._starts[group]

    def _group(self, group: int):
        """The image column of one row group, a struct array."""
        if group in self._cache:
            self._cache.move_to_end(group)
            return self._cache[group][0]
        if self._owner != os.getpid():  # file positions are shared with a parent process: open them anew
            self._files, self._owner = {}, os.getpid()
        number, inside = self._groups[group]
        if number not in self._files:
            self._files[number] = parquet_module().ParquetFile(self.paths[number])
        table = self._files[number].read_row_group(inside, columns=["image"], use_threads=False)
        column = table.column("image").combine_chunks()
        self._cache[group] = (column, column.nbytes)
        while len(self._cache) > 1 and sum(size for _, size in self._cache.values()) > self.cache_bytes:
            self._cache.popitem(last=False)
        return column

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_files": {}, "_cache": OrderedDict()}


def _class_names(metadata: dict[bytes, bytes]) -> list[str] | None:
    """Names stored by the `datasets` library in the schema."""
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        return list(features["label"]["names"])
    except (KeyError, TypeError, ValueError):
        return None
