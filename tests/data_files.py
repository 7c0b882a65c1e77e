"""Small pictures that tell their number, as files in every layout."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from shiftaddvit.data.images import ImageData

CLASSES = ["ant", "bee", "cat"]


def picture(number: int, size: tuple[int, int] = (24, 20)) -> Image.Image:
    """An image that tells its number: the red channel is 7 times it, everywhere."""
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    pixels[..., 0] = 7 * number
    return Image.fromarray(pixels)


def number_of(image: Image.Image) -> int:
    return round(float(np.asarray(image)[..., 0].mean()) / 7)


def encoded(number: int, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    picture(number).save(buffer, kind, **({"lossless": True} if kind == "WEBP" else {}))
    return buffer.getvalue()


def write_folder(root: Path, count: int = 12) -> Path:
    """Class folders; sorted by class, then by number."""
    for number in range(count):
        folder = root / CLASSES[number * len(CLASSES) // count]
        folder.mkdir(parents=True, exist_ok=True)
        picture(number).save(folder / f"{number:02d}.png")
    return root


def write_parquet(root: Path, counts: dict[str, int], rows: int = 3, names: bool = True) -> Path:
    """Shards one after the other; image n has label n % 3."""
    root.mkdir(parents=True, exist_ok=True)
    number = 0
    for file, count in counts.items():
        images = [{"bytes": encoded(n), "path": f"{n}.png"} for n in range(number, number + count)]
        table = pa.table({"image": images, "label": [n % 3 for n in range(number, number + count)]})
        if names:
            features = {"label": {"names": CLASSES, "_type": "ClassLabel"}}
            table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
        pq.write_table(table, root / file, row_group_size=rows)
        number += count
    return root


def write_tar(path: Path, numbers: range, labels: bool = True, kind: str = "webp") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for number in numbers:
            for extension, content in ((kind, encoded(number, kind.upper())), ("cls", str(number % 3).encode()), ("json", b"{}")):
                if extension == "cls" and not labels:
                    continue
                member = tarfile.TarInfo(f"sub/{number:04d}.{extension}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


def assert_holds(data: ImageData, numbers: list[int], labels: list[int]) -> None:
    assert [number_of(data[i][0]) for i in range(len(data))] == numbers
    assert [data[i][1] for i in range(len(data))] == labels == data.labels.tolist()
    image = data[len(data) - 1][0]
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), np.asarray(picture(numbers[-1])))
