"""A view model as one safetensors file: weights, its shape, its recipe, and what it was trained on."""

import json
import os
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from shiftaddvit.entropy import deflate_codes, inflate_codes
from shiftaddvit.errors import UserError, unknown
from shiftaddvit.files import atomic_write
from shiftaddvit.layers.packed import pack
from shiftaddvit.reparam import Recipe, reparameterize
from shiftaddvit.serialization import read_metadata

from .card import ViewFacts, write_view_card
from .floors import Nearest, Sweep
from .gnt import GNT, GNTConfig
from .nerf import NeRF, NeRFConfig

FORMAT = 2
"""Of new files. Format 1 differs in packed codes, which it holds as they lie in memory."""
HEADER = "shiftaddvit.nvs"


def kind_of(model: nn.Module) -> str:
    """`gnt`, `nerf`, `sweep` or `nearest`."""
    for kind, cls in (("gnt", GNT), ("nerf", NeRF), ("sweep", Sweep), ("nearest", Nearest)):
        if isinstance(model, cls):
            return kind
    raise UserError(f"{type(model).__name__} is not a view model; allowed: GNT, NeRF")


def save_model(model: GNT | NeRF, path: str | os.PathLike, trained: ViewFacts = ViewFacts(), packed: bool = False) -> Path | None:
    """Write weights, configuration and recipe, atomically, and a model card beside them. `packed` stores shift layers as integer codes: the
    same function, no longer trainable. `trained` is kept in the file: which scenes, how large, how long, how well. Returns where the card
    went; None where the user's own files are in the way."""
    recipe = getattr(model, "shiftaddvit_recipe", None)
    packed = packed or getattr(model, "shiftaddvit_packed", False)
    header = {
        "format": FORMAT,
        "kind": kind_of(model),
        "config": asdict(model.config),
        "recipe": recipe.to_dict() if recipe is not None else None,
        "packed": packed,
        "trained": trained.to_json(),
    }
    written = pack(deepcopy(model)) if packed else model
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in written.state_dict().items()}
    deflate_codes(written, tensors)
    with atomic_write(path) as temporary:
        save_file(tensors, temporary, metadata={HEADER: json.dumps(header), "format": "pt"})
    return write_view_card(Path(path), written, header, trained)


def load_model(path: str | os.PathLike, device: torch.device | str = "cpu") -> GNT | NeRF:
    """The model that `save_model` wrote, in evaluation mode; `model.trained` says on what it was trained."""
    header = read_header(path)
    config = header["config"]
    model = GNT(GNTConfig(**config)) if header["kind"] == "gnt" else NeRF(NeRFConfig(**config))
    if header["recipe"] is not None:
        reparameterize(model, Recipe.from_dict(header["recipe"], source=f"the recipe in {path}"))
    if header["packed"]:
        pack(model)
        model.shiftaddvit_packed = True
    with safe_open(str(path), framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    if header["format"] > 1:
        inflate_codes(model, tensors, path)
    load_weights(model, tensors, str(path))
    model.trained = ViewFacts.from_json(header["trained"])
    return model.to(device).eval()


def read_header(path: str | os.PathLike) -> dict:
    """What the file says of its model."""
    text = read_metadata(path).get(HEADER)
    if text is None:
        raise UserError(f"{path} holds no view model; allowed: a file written by 'nvs train', or a published GNT .pth")
    header = json.loads(text)
    if header.get("format") not in range(1, FORMAT + 1):
        raise UserError(f"{path} has format {header.get('format')}; this version reads formats up to {FORMAT}")
    if header.get("kind") not in ("gnt", "nerf"):
        raise unknown(f"kind of model in {path}", str(header.get("kind")), ("gnt", "nerf"))
    return header


def load_weights(model: nn.Module, tensors: dict[str, torch.Tensor], source: str) -> None:
    """Load strictly; UserError naming the first tensors that are missing, too many, or of another shape."""
    expected = model.state_dict()
    problems = [f"missing {key}" for key in sorted(expected.keys() - tensors.keys())]
    problems += [f"unexpected {key}" for key in sorted(tensors.keys() - expected.keys())]
    for key in sorted(expected.keys() & tensors.keys()):
        if expected[key].shape != tensors[key].shape:
            problems.append(f"{key} has shape {tuple(tensors[key].shape)}, the model needs {tuple(expected[key].shape)}")
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise UserError(f"{source} does not fit the model: {'; '.join(problems[:4])}{more}")
    model.load_state_dict(tensors)
