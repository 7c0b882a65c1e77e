"""The folder that goes to a hardware engineer: description, weights, vectors of every layer, and the reference that explains them."""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from shiftaddvit.errors import UserError
from shiftaddvit.files import atomic_folder
from shiftaddvit.ops.matshift import formats

from . import reference
from .accuracy import compare
from .audit import Audit, audit
from .convert import to_integers
from .lower import as_tokens
from .network import Network
from .widths import Widths

DESCRIPTION = "network.json"

_README = """\
An integer network: `network.json` describes it, `arrays/` holds its constants, `vectors/` every tensor of {images} test images, `packed/`
the shift weights as packed bytes, `audit.json` what every layer computes. Each array is there twice: `.npy`, and `.hex` for $readmemh (one
value a line, row by row, two's complement).

    python reference.py .        runs the network on the test images with NumPy and compares every tensor, bit for bit

The words are explained in docs/hardware.md of shiftaddvit, which wrote this folder.
"""


@dataclass(frozen=True)
class HardwareReport:
    """What was handed over."""

    path: str
    """The folder."""
    bytes: int
    """Its size."""
    layers: int
    """Layers of the integer network."""
    converted: int
    """Layers that shift and add only, as the audit found."""
    remaining: dict[str, int]
    """{kind: multiplications and divisions an image} of the others."""
    images: int
    """Images that the ranges were calibrated on."""
    same_class: int
    """Calibration images on which the integer network and the model agree."""

    def __str__(self) -> str:
        rest = ", ".join(f"{kind} {count:,}" for kind, count in self.remaining.items())
        return (
            f"{self.path}: {self.layers} layers, {self.bytes / 1e6:.1f} MB; {self.converted} of them only shift and add, proven by the audit; "
            f"multiplications and divisions left, an image: {rest}; same class as the model on {self.same_class} of the {self.images} "
            "images it was calibrated on"
        )


@torch.no_grad()
def hand_over(
    model: nn.Module, images: Float[Tensor, "B C H W"], output: str | os.PathLike, *, widths: Widths = Widths(), vectors: int = 2
) -> HardwareReport:
    """Make the integer network of `model`, calibrated on `images`, audit it and write everything to the folder `output`, atomically.

    `vectors` is how many of the images become test vectors. UserError for a part without an integer form, or a folder that holds something
    else than an earlier hand-off.
    """
    output = Path(output)
    _check_output(output)
    if vectors < 1:
        raise UserError(f"vectors must be at least 1, got {vectors}")
    network = to_integers(model, images, widths)
    pixels = network.to_integers(as_tokens(images).cpu().numpy())
    same = compare(model, network, [(images, torch.zeros(len(images)))]).same
    found = audit(network, pixels[:1])
    if found.failures:
        raise RuntimeError("the audit failed: " + "; ".join(found.failures[:4]))
    tensors = network.run(pixels[:vectors])
    with atomic_folder(output) as folder:
        write(network, tensors, found, folder)
    size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    layers = network.description["layers"]
    converted = sum(layer["primitive"] in ("shift", "add") for layer in layers)
    return HardwareReport(str(output), size, len(layers), converted, found.remaining(), len(images), same)


def write(network: Network, tensors: dict[str, np.ndarray], found: Audit, folder: Path) -> None:
    """Everything into an empty folder."""
    for part in ("arrays", "vectors", "packed"):
        (folder / part).mkdir()
    for name, array in network.arrays.items():
        write_array(folder / "arrays" / name, array, 8 * array.dtype.itemsize)
    for name, array in tensors.items():
        kind = np.dtype(f"int{next(size for size in (8, 16, 32, 64) if bits_of(network, name) <= size)}")
        write_array(folder / "vectors" / name, array.astype(kind), bits_of(network, name))
    for layer in network.description["layers"]:
        if layer["kind"] == "shift_linear":
            codes = torch.from_numpy(network.arrays[layer["arrays"]["codes"]].astype(np.uint8))
            write_array(folder / "packed" / layer["name"], formats.pack(codes, layer["code_bits"]).numpy(), 8)
    (folder / DESCRIPTION).write_text(json.dumps(described(network), indent=1) + "\n")
    (folder / "audit.json").write_text(json.dumps(found.to_json(), indent=1) + "\n")
    (folder / "README.md").write_text(_README.format(images=len(tensors["image"])))
    shutil.copyfile(reference.__file__, folder / "reference.py")


def described(network: Network) -> dict:
    """The description with the shape and the width of every array."""
    arrays = {name: {"bits": 8 * array.dtype.itemsize, "shape": list(array.shape)} for name, array in network.arrays.items()}
    return network.description | {"arrays": arrays}


def bits_of(network: Network, tensor: str) -> int:
    """Width of a tensor's integers."""
    return network.description["tensors"][tensor]["bits"]


def write_array(path: Path, array: np.ndarray, bits: int) -> None:
    """`path`.npy, and `path`.hex with a value of `bits` bits a line: two's complement in as many digits as that takes."""
    np.save(path.with_name(path.name + ".npy"), array)
    digits = -(-bits // 4)
    mask = (1 << 4 * digits) - 1
    path.with_name(path.name + ".hex").write_text("".join(f"{int(value) & mask:0{digits}x}\n" for value in array.reshape(-1)))


def _check_output(output: Path) -> None:
    if output.exists() and not output.is_dir():
        raise UserError(f"{output} is a file: give a folder")
    if output.is_dir() and any(output.iterdir()) and not (output / DESCRIPTION).is_file():
        raise UserError(f"{output} holds files that are no hand-off: choose another folder")
