"""Training the hash functions of a converted model: an explicit, seeded step whose result is part of the checkpoint."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from shiftaddvit.layers.hashing import KernelHash


def needs_calibration(model: nn.Module) -> bool:
    """Whether the model has hash functions that were never trained."""
    return any(isinstance(module, KernelHash) and not module.calibrated for module in model.modules())


@torch.no_grad()
def calibrate(model: nn.Module, images: Float[Tensor, "B C H W"], seed: int = 0) -> int:
    """Train the hash functions of every attention layer, front to back in one forward over `images` (a few are enough: the
    similarity targets take tokens² numbers an image and head). Returns how many were trained.

    The random draws come from a CPU generator with `seed`, so every device draws the same; with several processes, calibrate on one
    set of images and broadcast, as `finetune` does.
    """
    generator = torch.Generator().manual_seed(seed)
    hashes = [module for module in model.modules() if isinstance(module, KernelHash)]
    handles = [module.register_forward_pre_hook(_calibrator(generator)) for module in hashes]
    training = model.training
    try:
        model.eval()
        if hashes:
            model(images)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return len(hashes)


def _calibrator(generator: torch.Generator):
    def train_before_use(module: KernelHash, inputs: tuple[Tensor, ...]) -> None:
        module.calibrate(inputs[0], generator)

    return train_before_use
