"""From a model and calibration images to its integer network."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from shiftaddvit.errors import UserError

from .calibrate import in_parts, observe
from .lower import as_tokens, lower
from .network import Network
from .quantise import quantise
from .widths import Widths

_SAME = 1e-3
"""Largest difference of a logit of the lowered network on floats, relative to max(1, largest logit): both compute the same function."""


@torch.no_grad()
def to_integers(model: nn.Module, images: Float[Tensor, "B C H W"], widths: Widths = Widths()) -> Network:
    """The integer network of `model` (dense or converted; it is not changed), its ranges calibrated on `images`, normalised.

    Raises:
        UserError: a part without an integer form, named, or images that do not fit the model.
    """
    if images.dim() != 4 or len(images) == 0:
        raise UserError(f"images must be (B, C, H, W) with at least one image, got {tuple(images.shape)}")
    size = tuple(images.shape[2:])
    layers = lower(model, size, widths)
    images = images.detach().float().cpu()
    modes = {module: module.training for module in model.modules()}
    model.eval()
    device = next(model.parameters()).device
    expected = in_parts(as_tokens(images), lambda part: model(_as_images(part, size).to(device)).double().cpu())
    for module, training in modes.items():
        module.training = training
    observed, got = observe(layers, as_tokens(images))
    # Codes and routes are decisions that rounding may turn on single images: the median image decides.
    difference = float((got - expected).abs().amax(dim=1).median())
    if not difference <= _SAME * max(1.0, float(expected.abs().max())):
        raise UserError(
            f"the lowered network does not compute what the model does (logits differ by {difference:.2g}): this is a bug in the lowering"
        )
    return quantise(layers, observed, widths, size)


def _as_images(tokens: Tensor, size: tuple[int, int]) -> Tensor:
    return tokens.transpose(1, 2).unflatten(2, size)
