"""How close a rendered picture is: PSNR, SSIM, LPIPS."""

import math
import os
import pickle
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from shiftaddvit.errors import UserError


def psnr(rendered: Float[Tensor, "H W 3"], truth: Float[Tensor, "H W 3"]) -> float:
    """Peak signal-to-noise ratio in dB of pictures in [0, 1]; infinite for equal ones."""
    error = (rendered.double() - truth.double()).square().mean().item()
    return math.inf if error == 0 else -10 * math.log10(error)


def ssim(rendered: Float[Tensor, "H W 3"], truth: Float[Tensor, "H W 3"]) -> float:
    """Structural similarity with the usual 11×11 Gaussian window (σ = 1.5), mean over pixels and colours."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    planes = [image.permute(2, 0, 1)[None].float() for image in (rendered, truth)]
    return structural_similarity_index_measure(*planes, gaussian_kernel=True, sigma=1.5, kernel_size=11, data_range=1.0).item()


class Lpips:
    """Learned perceptual similarity (VGG), from given weights of torchvision's `vgg16`: never downloaded, never guessed."""

    def __init__(self, weights: str | os.PathLike, device: torch.device | str = "cpu"):
        try:
            import lpips
        except ImportError:
            raise UserError("LPIPS needs the package lpips, which is not installed: pip install 'shiftaddvit[nvs]'") from None
        self.device = device
        self.net: nn.Module = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False).to(device).eval()
        _load_vgg(self.net.net, Path(weights))

    @torch.no_grad()
    def __call__(self, rendered: Float[Tensor, "H W 3"], truth: Float[Tensor, "H W 3"]) -> float:
        planes = [image.permute(2, 0, 1)[None].float().to(self.device) for image in (rendered, truth)]
        return self.net(*planes, normalize=True).item()


def _load_vgg(net: nn.Module, path: Path) -> None:
    """torchvision's `features.N` into the slices that lpips cuts the network into, which keep N."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            tensors = load_file(str(path))
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise UserError(f"{path} cannot be read as weights of vgg16: {str(error).splitlines()[0]}") from None
    for name, parameter in net.named_parameters():
        _, number, kind = name.split(".")
        found = tensors.get(f"features.{number}.{kind}")
        if found is None or found.shape != parameter.shape:
            raise UserError(f"{path} does not hold torchvision's vgg16: features.{number}.{kind} is missing or has another shape")
        parameter.data.copy_(found)
