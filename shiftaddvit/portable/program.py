"""`export`: trace the model once with a free batch size, write it in the format asked for, and run what was written before it counts."""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from shiftaddvit.errors import UserError, unknown
from shiftaddvit.files import atomic_write

from . import onnx_file
from .frozen import frozen

FORMATS = {"torch": ".pt2", "onnx": ".onnx", "vectors": ""}
"""Formats and how their files end; vectors are a folder."""

BATCHES = (1, 3, 8)
"""Batch sizes that a written file is run with."""

_SETTINGS = "shiftaddvit.json"


@dataclass(frozen=True)
class ExportReport:
    """What was written, and how near its logits are."""

    path: str
    """The file."""
    format: str
    """`torch` or `onnx`."""
    bytes: int
    """Its size."""
    largest_difference: float
    """Largest |logit of the file − logit of the model| over the images it was run on."""
    images: int
    """How many those are."""
    same_class: int
    """On how many of them both have the same largest logit."""
    runtime: str
    """What ran the file."""

    def __str__(self) -> str:
        return (
            f"{self.path}: {self.bytes / 1e6:.2f} MB; in {self.runtime} its logits differ by at most {self.largest_difference:.1e}, "
            f"same class on {self.same_class} of {self.images} images (batches of {', '.join(map(str, BATCHES))})"
        )


def export(
    model: nn.Module,
    output: str | os.PathLike,
    format: str,
    *,
    images: Float[Tensor, "B 3 H W"] | None = None,
    packed: bool = False,
    opset: int | None = None,
    tolerance: float = 1e-3,
    metadata: Mapping[str, object] | None = None,
) -> "ExportReport | HardwareReport":  # noqa: F821  (the second is named where it lives, which is loaded only for `vectors`)
    """Write `model`, dense or converted, latent or packed, for another runtime; atomically, and only if it computes the same.

    Args:
        model: maps images to logits; it is not changed.
        output: file to write, ending in `.pt2` (torch) or `.onnx`; for `vectors` a folder.
        format: `torch` (a `torch.export` program) · `onnx` · `vectors` (integers for hardware, see `shiftaddvit.hardware`).
        images: normalised images to run the written file on, and for `vectors` to calibrate on. Noise of the model's own image size if
            left out, which `vectors` does not take.
        packed: keep shift weights as 4- or 5-bit codes, decoded inside the program; the file is smaller, the logits are the same.
        opset: of ONNX; None for what the installed torch recommends.
        tolerance: largest difference of a logit, relative to max(1, largest logit).
        metadata: JSON values to store in the file, such as the class names.

    Raises:
        UserError: a wrong format or file name, an op without an ONNX form (named), or logits that differ.
    """
    if format not in FORMATS:
        raise unknown("format", format, FORMATS)
    output = Path(output)
    if format == "vectors":
        from shiftaddvit.hardware import hand_over

        if packed or opset is not None:
            raise UserError("packed and opset are about formats 'torch' and 'onnx': vectors hold shift weights packed and unpacked")
        if images is None:
            raise UserError("format 'vectors' calibrates the ranges of activations on images: give some")
        return hand_over(model, images, output)
    if output.suffix != FORMATS[format]:
        raise UserError(f"a file of format {format!r} must end in {FORMATS[format]}, got {str(output)!r}")
    if opset is not None and format != "onnx":
        raise UserError("opset is about format 'onnx' only")
    constant = frozen(model, packed)
    samples = _samples(constant, images)
    with torch.no_grad():
        if not isinstance(constant(samples[:1]), Tensor):
            raise UserError(f"{type(model).__name__} gives more than one tensor: export takes models that map images to logits")
        # Of a batch of one, the tracer would take the one for a constant.
        program = torch.export.export(constant, (samples[:2],), dynamic_shapes=({0: Dim("batch", min=1)},))
    about = {"recipe": getattr(getattr(model, "shiftaddvit_recipe", None), "name", None), "image_size": list(samples.shape[2:])} | dict(
        metadata or {}
    )
    with atomic_write(output) as temporary:
        if format == "onnx":
            onnx_file.write(program, temporary, opset, {key: json.dumps(value) for key, value in about.items()})
            run, runtime = onnx_file.runner(temporary)
        else:
            run, runtime = _write_torch(program, temporary, about)
        difference, same = _compare(constant, run, samples, tolerance)
    return ExportReport(str(output), format, output.stat().st_size, difference, sum(BATCHES), same, runtime)


def _samples(model: nn.Module, images: Tensor | None) -> Tensor:
    """As many images as the largest batch, repeated where fewer were given."""
    if images is None:
        size = getattr(getattr(model, "patch_embed", None), "img_size", None)
        config = getattr(model, "pretrained_cfg", None) or {}
        height, width = size or tuple(config.get("input_size", (3, 224, 224)))[1:]
        return torch.randn(max(BATCHES), 3, height, width, generator=torch.Generator().manual_seed(0))
    if images.dim() != 4 or len(images) == 0:
        raise UserError(f"images must be (B, 3, H, W) with at least one image, got {tuple(images.shape)}")
    images = images.detach().float().cpu()
    return images[torch.arange(max(BATCHES)) % len(images)]


def _write_torch(program: ExportedProgram, path: Path, about: Mapping[str, object]) -> tuple[Callable[[Tensor], Tensor], str]:
    with open(path, "wb") as file:
        torch.export.save(program, file, extra_files={_SETTINGS: json.dumps(about)})
    with open(path, "rb") as file:
        loaded = torch.export.load(file).module()
    return loaded, f"torch {torch.__version__}"


@torch.no_grad()
def _compare(model: nn.Module, run: Callable[[Tensor], Tensor], samples: Tensor, tolerance: float) -> tuple[float, int]:
    """Largest difference and count of equal classes over all batch sizes. UserError beyond the tolerance."""
    largest, same = 0.0, 0
    for batch in BATCHES:
        expected, got = model(samples[:batch]), run(samples[:batch])
        if got.shape != expected.shape:
            raise UserError(
                f"the exported program gives {tuple(got.shape)} for a batch of {batch}, the model {tuple(expected.shape)}: nothing was written"
            )
        difference = float((got - expected).abs().max())
        allowed = tolerance * max(1.0, float(expected.abs().max()))
        if not difference <= allowed:
            raise UserError(
                f"the exported program's logits differ by {difference:.2g} at batch {batch}, more than {allowed:.2g}: nothing was written. "
                "Codes and routes are decisions that rounding can turn; if that is all, allow it with a larger tolerance"
            )
        largest, same = max(largest, difference), same + int((got.argmax(1) == expected.argmax(1)).sum())
    return largest, same
