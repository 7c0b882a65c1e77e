"""GNT's feature net: a residual U-net, 32 channels at a quarter of the resolution. Published key names."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


def _norm(channels: int) -> nn.InstanceNorm2d:
    return nn.InstanceNorm2d(channels, affine=True, track_running_stats=False)


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1, bias: bool = False) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=bias, padding_mode="reflect")


class BasicBlock(nn.Module):
    """ResNet's two-convolution block, with reflect padding and instance norm."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = _conv(inputs, outputs, 3, stride), _norm(outputs)
        self.conv2, self.bn2 = _conv(outputs, outputs, 3), _norm(outputs)
        change = stride != 1 or inputs != outputs
        self.downsample = nn.Sequential(_conv(inputs, outputs, 1, stride), _norm(outputs)) if change else None

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D h w"]:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(x)) + shortcut)


class ConvElu(nn.Module):
    """Convolution, instance norm, ELU."""

    def __init__(self, inputs: int, outputs: int, kernel: int):
        super().__init__()
        self.conv, self.bn = _conv(inputs, outputs, kernel, bias=True), _norm(outputs)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D H W"]:
        return F.elu(self.bn(self.conv(x)))


class UpConv(nn.Module):
    """Twice the resolution, bilinear, then `ConvElu`."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.conv = ConvElu(inputs, outputs, 3)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D 2H 2W"]:
        return self.conv(F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True))


class ResUNet(nn.Module):
    """ResNet-34 stages 1–3, each at half the resolution of the one before, two up-convolutions with skips.

    `base` is the width of the first stage: 64 as published (8,877,056 parameters); smaller for tiny models. Pictures narrower or lower
    than 32 pixels raise `ValueError`: reflect padding needs two pixels at 1/16.
    """

    def __init__(self, channels: int = 32, base: int = 64):
        super().__init__()
        self.conv1, self.bn1 = _conv(3, base, 7, 2), _norm(base)
        self.layer1 = _stage(base, base, 3)
        self.layer2 = _stage(base, 2 * base, 4)
        self.layer3 = _stage(2 * base, 4 * base, 6)
        self.upconv3, self.iconv3 = UpConv(4 * base, 2 * base), ConvElu(4 * base, 2 * base, 3)
        self.upconv2, self.iconv2 = UpConv(2 * base, base), ConvElu(2 * base, channels, 3)
        self.out_conv = nn.Conv2d(channels, channels, 1)

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B C h w"]:
        if min(images.shape[-2:]) < 32:
            raise ValueError(f"pictures of {images.shape[-1]}×{images.shape[-2]} pixels; the feature net needs 32×32 at least")
        x = F.relu(self.bn1(self.conv1(images)))
        quarter = self.layer1(x)
        eighth = self.layer2(quarter)
        x = self.iconv3(_join(eighth, self.upconv3(self.layer3(eighth))))
        x = self.iconv2(_join(quarter, self.upconv2(x)))
        return self.out_conv(x)


def _stage(inputs: int, outputs: int, blocks: int) -> nn.Sequential:
    return nn.Sequential(BasicBlock(inputs, outputs, 2), *(BasicBlock(outputs, outputs, 1) for _ in range(blocks - 1)))


def _join(skip: Float[Tensor, "B C h w"], up: Float[Tensor, "B D H W"]) -> Float[Tensor, "B E H W"]:
    """Channels of the upsampled tensor, then the skip's, zero-padded to the same size (odd sizes differ by one)."""
    rows, columns = up.shape[-2] - skip.shape[-2], up.shape[-1] - skip.shape[-1]
    skip = F.pad(skip, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
    return torch.cat([up, skip], dim=1)
