"""Which expert each region of an image goes to, in every mixture of a model: the records behind the report's token maps."""

import io
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import isqrt
from typing import Any

import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor, nn

from shiftaddvit.errors import UserError
from shiftaddvit.layers.moe import MoELinear, MoEMlp
from shiftaddvit.layers.router import record_routing

LOSSLESS_SIDE = 64
"""Pictures up to this size are stored as PNG, larger ones as JPEG."""
BATCH = 32


@dataclass(frozen=True)
class DispatchLayer:
    """One mixture."""

    name: str
    """Module name."""
    experts: tuple[str, ...]
    """What each expert computes with: `mult` or `shift`."""
    tokens: int
    """Of one image."""
    grid: tuple[int, int] | None
    """Rows and columns of the tokens that are regions of the image; None where they do not lie on a grid of the image's form."""
    prefix: int
    """Tokens before them (class token and the like)."""
    share: tuple[float, ...]
    """Share of the tokens of each expert, over all images."""


@dataclass(frozen=True)
class DispatchPicture:
    """One image and where its tokens went."""

    name: str
    """Of the image."""
    image: str
    """The image as the model sees it, cropped and scaled, as a data URI."""
    width: int
    """In pixels."""
    height: int
    """In pixels."""
    label: str | None
    """Its class, where that is known."""
    predicted: str
    """The class that the model gives it."""
    experts: dict[str, str]
    """By layer: one digit a token, the index of its expert."""


@dataclass(frozen=True)
class Dispatch:
    """All mixtures of a model over some images."""

    images: int
    """Images that the shares are over."""
    layers: tuple[DispatchLayer, ...]
    """In the order of execution."""
    pictures: tuple[DispatchPicture, ...]
    """The first images, with their maps."""

    @property
    def shift_share(self) -> float:
        """Share of all tokens of all mixtures that go to a shift expert."""
        shifted = sum(
            layer.tokens * share for layer in self.layers for share, kind in zip(layer.share, layer.experts, strict=True) if kind == "shift"
        )
        return shifted / sum(layer.tokens for layer in self.layers)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


@torch.no_grad()
def dispatch(
    model: nn.Module,
    images: Float[Tensor, "N 3 H W"],
    pictures: UInt8[Tensor, "K H W 3"],
    names: Sequence[str],
    labels: Sequence[str | None] | None = None,
    classes: Sequence[str] | None = None,
) -> Dispatch:
    """Run the model once over `images` and keep what its routers decide, without noise.

    Args:
        images: as the model wants them; shares are over all of them.
        pictures: the first K of them for people to look at; these get maps.
        names: of the K pictures.
        labels: their classes, if known.
        classes: names of the model's outputs.

    Raises:
        UserError: a model without mixtures.
    """
    mixtures = {name: module for name, module in model.named_modules() if isinstance(module, (MoELinear, MoEMlp))}
    if not mixtures:
        raise UserError("the model has no mixture of experts, so nothing is dispatched; recipes whose name ends in 'moe' have mixtures")
    device = next(model.parameters()).device
    was_training = model.training
    chosen: dict[str, list[Tensor]] = {}
    predicted: list[int] = []
    model.eval()
    try:
        with record_routing(model) as routing:
            for batch in images.split(BATCH):
                routing.clear()
                predicted += model(batch.to(device)).argmax(dim=-1).tolist()
                for name, found in routing.items():
                    chosen.setdefault(name, []).append(found.index.reshape(len(batch), -1).cpu())
    finally:
        model.train(was_training)
    index = {name: torch.cat(parts) for name, parts in chosen.items()}
    prefix = getattr(model, "num_prefix_tokens", 0)
    layers = tuple(_layer(name, index[name], mixtures[name].config.experts, tuple(images.shape[-2:]), prefix) for name in index)
    shown = tuple(
        DispatchPicture(
            names[number], _data_uri(picture), picture.shape[1], picture.shape[0], labels[number] if labels else None,
            classes[predicted[number]] if classes else f"class {predicted[number]}",
            {name: "".join(map(str, index[name][number].tolist())) for name in index},
        )
        for number, picture in enumerate(pictures)
    )  # fmt: skip
    return Dispatch(len(images), layers, shown)


def _layer(name: str, index: Tensor, experts: tuple[str, ...], size: tuple[int, int], prefix: int) -> DispatchLayer:
    counts = torch.bincount(index.flatten(), minlength=len(experts)).double()
    grid, before = token_grid(index.shape[1], size, prefix)
    return DispatchLayer(name, tuple(experts), index.shape[1], grid, before, tuple((counts / counts.sum()).tolist()))


def token_grid(tokens: int, size: tuple[int, int], prefix: int = 0) -> tuple[tuple[int, int] | None, int]:
    """(rows, columns) with the sides' ratio of an image of `size`, and the tokens before the grid: as many as the model says, none, or
    one (PVTv1's last stage has a class token). (None, 0) where no grid fits."""
    height, width = size
    for before in dict.fromkeys((prefix, 0, 1)):
        cells = tokens - before
        rows = isqrt(cells * height // width) if cells > 0 else 0
        if rows and cells % rows == 0 and rows * width == cells // rows * height:
            return (rows, cells // rows), before
    return None, 0


def _data_uri(picture: UInt8[Tensor, "H W 3"]) -> str:
    kind = "PNG" if max(picture.shape[:2]) <= LOSSLESS_SIDE else "JPEG"
    file = io.BytesIO()
    Image.fromarray(picture.numpy()).save(file, kind, **({"quality": 85} if kind == "JPEG" else {"optimize": True}))
    return f"data:image/{kind.lower()};base64,{b64encode(file.getvalue()).decode()}"
