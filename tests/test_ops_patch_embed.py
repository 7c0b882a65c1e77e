"""Patch embedding equals convolution, LayerNorm, class token and positions, from pictures and from tokens."""

import pytest
import torch
import torch.nn.functional as F
from ops_checks import error, poisoned_outputs

from shiftaddvit.errors import UserError
from shiftaddvit.ops.patch_embed import flatten_weight, patch_embed

BACKENDS = ("reference", "triton")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("side", "kernel", "stride", "padding", "outputs"), [(29, 7, 4, 3, 32), (8, 4, 4, 0, 20), (5, 5, 2, 2, 33)])
def test_pictures(side, kernel, stride, padding, outputs, backend):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 3, side, side + 2), torch.randn(outputs, 3, kernel, kernel), torch.randn(outputs)
    norm = torch.randn(outputs), torch.randn(outputs)
    expected = F.conv2d(x.double(), weight.double(), bias.double(), stride, padding).flatten(2).transpose(1, 2)
    expected = F.layer_norm(expected, (outputs,), norm[0].double(), norm[1].double(), 1e-6)
    with poisoned_outputs():
        y = patch_embed(x, weight, bias, stride, padding, norm=norm, backend=backend)
    assert error(y, expected) < 2e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("height", "width", "channels", "outputs"), [(7, 9, 32, 48), (2, 2, 40, 16)])
def test_tokens(height, width, channels, outputs, backend):
    torch.manual_seed(0)
    x, weight = torch.randn(3, height * width, channels), torch.randn(outputs, channels, 3, 3) / 10
    pictures = x.double().transpose(1, 2).reshape(3, channels, height, width)
    expected = F.conv2d(pictures, weight.double(), None, 2, 1).flatten(2).transpose(1, 2)
    with poisoned_outputs():
        y = patch_embed(x, weight, stride=2, padding=1, size=(height, width), backend=backend)
    assert error(y, expected) < 2e-6
    flat = flatten_weight(weight, planes=False)
    assert torch.equal(patch_embed(x, flat, None, 2, 1, (height, width), kernel=3, backend=backend), y)


@pytest.mark.parametrize("backend", BACKENDS)
def test_prefix_tokens_and_positions(backend):
    torch.manual_seed(0)
    x, weight = torch.randn(3, 3, 8, 12).half(), torch.randn(24, 3, 4, 4).half()
    prefix, position = torch.randn(2, 24), torch.randn(8, 24)
    patches = F.conv2d(x.double(), weight.double(), None, 4).flatten(2).transpose(1, 2)
    expected = torch.cat([prefix.expand(3, -1, -1).double(), patches], 1) + position
    with poisoned_outputs():
        y = patch_embed(x, weight, stride=4, prefix=prefix, position=position, backend=backend)
    assert y.dtype == torch.float16 and error(y, expected) < 1e-3


def test_opcheck_empty_and_export():
    x, weight = torch.randn(2, 3, 8, 8), torch.randn(16, 3, 4, 4)
    args = (x, weight.reshape(16, -1), None, None, None, 1e-6, None, None, 8, 8, 4, 4, 0, True, False, "reference")
    torch.library.opcheck(torch.ops.shiftaddvit.patch_embed.default, args)
    assert patch_embed(x[:0], weight, stride=4, backend="triton").shape == (0, 4, 16)

    class Embed(torch.nn.Module):
        def forward(self, x):
            return patch_embed(x, weight, stride=4)

    assert torch.equal(torch.export.export(Embed(), (x,)).module()(x), Embed()(x))
    assert torch.equal(torch.compile(Embed(), fullgraph=True, backend="aot_eager")(x), Embed()(x))


def test_mistakes_are_named():
    x, weight = torch.randn(2, 3, 8, 8), torch.randn(16, 3, 4, 4)
    with pytest.raises(UserError, match=r"weight must be \(out, 3, k, k\)"):
        patch_embed(x, weight[:, :2])
    with pytest.raises(UserError, match="has no 4×4 patch"):
        patch_embed(x[:, :, :2], weight)
    with pytest.raises(UserError, match=r"position must be \(4, 16\)"):
        patch_embed(x, weight, stride=4, position=torch.zeros(3, 16))
