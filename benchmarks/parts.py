"""Files in parts of 15 MiB, for ways that take no large ones."""

from pathlib import Path

from shiftaddvit.files import atomic_write

PART = 15 << 20
"""Bytes of a part."""


def cut(file: Path, folder: Path, name: str) -> None:
    """`file` as NAME.0, NAME.1, … in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    data = file.read_bytes()
    for number, begin in enumerate(range(0, len(data), PART)):
        with atomic_write(folder / f"{name}.{number}") as temporary:
            Path(temporary).write_bytes(data[begin : begin + PART])


def joined(folder: Path, name: str, file: Path) -> bool:
    """Put the parts back together as `file`; False where there are none."""
    parts = sorted(folder.glob(f"{name}.[0-9]"))
    if parts:
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(file) as temporary:
            Path(temporary).write_bytes(b"".join(part.read_bytes() for part in parts))
    return bool(parts)
