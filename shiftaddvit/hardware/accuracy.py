"""How well the integer network does, beside the model that it came from."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shiftaddvit.errors import UserError

from . import torch_reference
from .calibrate import in_parts
from .lower import as_tokens
from .network import Network


@dataclass(frozen=True)
class Agreement:
    """Counts over the same images."""

    images: int
    """All of them."""
    model: int
    """Right by the float model."""
    integers: int
    """Right by the integer network."""
    same: int
    """Same class by both."""

    def __str__(self) -> str:
        model, integers, same = (100 * count / self.images for count in (self.model, self.integers, self.same))
        return f"top-1 {model:.2f} % as floats, {integers:.2f} % as integers, same class {same:.2f} %, of {self.images:,} images"


@torch.no_grad()
def compare(model: nn.Module, network: Network, loader: Iterable[tuple[Tensor, Tensor]]) -> Agreement:
    """Both on all images of `loader`, which yields (normalised images (B, C, H, W), labels); the integers by the torch reference, whose
    bits are those of the NumPy one. UserError for no images."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    device = next(model.parameters()).device
    counts = [0, 0, 0, 0]
    for images, labels in loader:
        size = images.shape[2:]
        floats = in_parts(as_tokens(images), lambda part: model(part.transpose(1, 2).unflatten(2, size).to(device)).argmax(1).cpu())  # noqa: B023
        pixels = torch.from_numpy(network.to_integers(as_tokens(images).cpu().numpy()))
        integers = in_parts(pixels, lambda part: torch_reference.logits(network, part).argmax(1))
        labels = labels.cpu()
        found = (len(labels), int((floats == labels).sum()), int((integers == labels).sum()), int((floats == integers).sum()))
        counts = [a + b for a, b in zip(counts, found, strict=True)]
    for module, training in modes.items():
        module.training = training
    if counts[0] == 0:
        raise UserError("no images to compare the integer network on")
    return Agreement(*counts)
