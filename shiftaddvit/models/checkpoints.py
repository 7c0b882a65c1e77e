"""Pre-trained weights into a dense model: official, timm and Hugging Face files, strictly, with a report of every key."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open
from torch import Tensor, nn

from shiftaddvit.errors import UserError

from .adapt import Adapted, adapt
from .describe import describe
from .layouts import LAYOUTS, Layout, Renamed, find_layout, rename
from .weights import read_file, read_weights, unwrap

__all__ = ["LoadReport", "load_pretrained", "read_weights"]


_CONVERTED = re.compile(r"\.(experts\.\d+|router|hash|token_conv)\.|\.(shift|sign|codes)$")


@dataclass(frozen=True)
class LoadReport:
    """What became of every key of a file, and where every key of the model has its values from."""

    path: str
    """The file."""
    layout: str
    """The layout that its keys are in."""
    architecture: str
    """What its shapes say it is."""
    used: tuple[tuple[str, str], ...]
    """(key in the file, key in the model, with its rows where several share one)."""
    made: tuple[tuple[str, str], ...]
    """(key in the model, how it starts): values that are not in the file as they are."""
    dropped: tuple[tuple[str, str], ...]
    """(key in the file, why the model does not have it)."""
    notes: tuple[str, ...]
    """What else may make the outputs differ from those of the file's own program."""

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.layout}, {self.architecture}"]
        for title, rows, arrow in (("used", self.used, "→"), ("made", self.made, "·"), ("dropped", self.dropped, "·")):
            lines.append(f"{title}: {len(rows)}")
            lines += [f"  {a} {arrow} {b}" for a, b in rows]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def load_pretrained(
    model: nn.Module, path: str | os.PathLike, *, num_classes_mismatch: Literal["reset", "error"] = "reset"
) -> LoadReport:
    """Fill a dense timm model (PVTv1 too) with the weights in `path`; in place, and a report is returned.

    The file may have the layout of timm, of the official PVTv1, PVTv2 and DeiT releases, or of Hugging Face (PVTv1, PVTv2, ViT, DeiT,
    DINOv2). Every key of the file and of the model must be accounted for. These differences are bridged and reported: another image
    size (position embeddings are resampled), a distilled file for a model that is not (its token and head are dropped), and, with
    `num_classes_mismatch="reset"`, another number of classes or a file without a head (the model's head starts anew).
    Raises UserError, with the model as it was, for anything else; it lists the keys.
    """
    if num_classes_mismatch not in ("reset", "error"):
        raise UserError(f"num_classes_mismatch must be 'reset' or 'error', got {num_classes_mismatch!r}")
    if hasattr(model, "shiftaddvit_recipe"):
        raise UserError("the model is already converted; load pre-trained weights into the dense model, then reparameterize it")
    weights, notes = unwrap(path, read_file(path))
    return fill(model, weights, path, num_classes_mismatch == "reset", notes)


def fill(
    model: nn.Module, weights: Mapping[str, Tensor], path: str | os.PathLike, reset_head: bool, notes: tuple[str, ...] = ()
) -> LoadReport:
    """`load_pretrained` for weights that are read already; `path` says where they are from."""
    layout = _layout_for(model, weights, path)
    try:
        renamed = rename(layout, weights)
        adapted = adapt(model, renamed.weights, reset_head)
    except UserError as error:
        raise UserError(f"{path} ({layout.name}): {error}") from None
    _check(model, path, layout, renamed, adapted)
    model.load_state_dict(adapted.weights, strict=True)
    return LoadReport(
        path=str(path),
        layout=layout.name,
        architecture=describe(renamed.weights),
        used=tuple(pair for target, pairs in renamed.sources.items() if target not in dict(adapted.dropped) for pair in pairs),
        made=tuple(adapted.made),
        dropped=(*renamed.dropped, *((pair[0], reason) for target, reason in adapted.dropped for pair in renamed.sources[target])),
        notes=(*notes, *adapted.notes, *_norm_notes(model, layout), *_dtype_notes(weights, Path(path))),
    )


def _layout_for(model: nn.Module, weights: Mapping[str, Tensor], path: str | os.PathLike) -> Layout:
    """The layout of `weights`; UserError unless it is one for this model."""
    own, layout = model.state_dict().keys(), find_layout(weights)
    if any(_CONVERTED.search(key) for key in weights.keys() - own):
        raise UserError(f"{path} holds a model that is already converted; give it to shiftaddvit.load")
    family = find_layout(own)
    if layout is not None and family is not None and family.rules is None:
        if family.family != layout.family:
            what = describe(rename(layout, weights).weights)
            raise UserError(f"{path} looks like {layout.name}, {what}; the model is {_model_name(model)}")
        return layout
    if 2 * len(own & weights.keys()) >= len(own):
        return Layout("the model's own keys", None)
    if layout is not None:
        raise UserError(f"{path} looks like {layout.name}, which cannot go into {_model_name(model)}")
    known = ", ".join(one.name for one in LAYOUTS)
    first = ", ".join(list(weights)[:3])
    raise UserError(
        f"{path} fits no layout that is known ({known}) nor the model's own keys ({_model_name(model)}); its keys begin with {first}"
    )


def _check(model: nn.Module, path: str | os.PathLike, layout: Layout, renamed: Renamed, adapted: Adapted) -> None:
    """Raise UserError unless the adapted weights are the model's, key by key and shape by shape."""
    state = model.state_dict()
    unexpected = [*renamed.unknown, *(renamed.sources[key][0][0] for key in adapted.weights if key not in state)]
    problems = [f"missing {key}" for key in state if key not in adapted.weights]
    problems += [f"unexpected {key}" for key in unexpected]
    problems += [
        f"{key} is {tuple(tensor.shape)}, must be {tuple(state[key].shape)}"
        for key, tensor in adapted.weights.items()
        if key in state and tensor.shape != state[key].shape
    ]
    if problems:
        more = [f"and {len(problems) - 8} more"] if len(problems) > 8 else []
        raise UserError(
            f"{path} ({layout.name}, {describe(renamed.weights)}) does not fit the model ({_model_name(model)}): "
            + "; ".join([*problems[:8], *more])
        )


def _model_name(model: nn.Module) -> str:
    registered = (getattr(model, "pretrained_cfg", None) or {}).get("architecture")
    return f"{registered or type(model).__name__}, {describe(model.state_dict())}"


def _norm_notes(model: nn.Module, layout: Layout) -> list[str]:
    norms = {name: module.eps for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)}
    odd = [name for name, eps in norms.items() if layout.norm_eps is not None and eps != layout.norm_eps]
    if not odd:
        return []
    return [
        f"LayerNorm epsilon: Hugging Face's default for this layout is {layout.norm_eps:g}, {len(odd)} of the model's {len(norms)} norms have "
        f"{norms[odd[0]]:g} ({odd[0]}, …): outputs differ slightly"
    ]


def _dtype_notes(weights: Mapping[str, Tensor], path: Path) -> list[str]:
    half = sum(tensor.dtype == torch.float16 for tensor in weights.values())
    if half and _saved_here(path):
        return [f"tensors stored as float16: {half} of {len(weights)}, those whose values it holds exactly; nothing is lost"]
    kinds = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in weights.values() if tensor.dtype != torch.float32})
    return [f"the file holds {', '.join(kinds)} values"] if kinds else []


def _saved_here(path: Path) -> bool:
    """Whether `shiftaddvit.save` wrote the file: it stores as float16 only what that loses nothing of."""
    if path.suffix != ".safetensors" or not path.is_file():
        return False
    with safe_open(str(path), framework="pt") as file:
        return "shiftaddvit" in (file.metadata() or {})
