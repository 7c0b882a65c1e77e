"""What every image data set here has in common: encoded bytes at random access, and what happens to one that cannot be read."""

import io
import zlib
from pathlib import Path
from struct import error as StructError
from typing import Protocol

from jaxtyping import UInt8
import numpy as np
from PIL import Image

UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, StructError, zlib.error, Image.DecompressionBombError)


def open_rgb(source: bytes | Path) -> Image.Image:
    """Decode an image, completely, to RGB. Raises one of `UNREADABLE`."""
    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
        return image.convert("RGB")
