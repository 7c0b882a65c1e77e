"""Patch embedding equals convolution, LayerNorm, class token and positions, from pictures and from tokens."""

import pytest
import torch
import torch.nn.functional as F
from ops_checks import error, poisoned_outputs

from shiftaddvit.errors import UserError
from shiftaddvit.ops.patch_embed import flatten_weight, patch_embed, unflatten_weight

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


@pytest.mark.parametrize(("side", "channels", "kernel", "stride", "padding"), [(9, 48, 3, 2, 1), (16, 32, 8, 8, 0), (7, 40, 2, 2, 0)])
def test_too_few_tokens_are_cut_into_parts_of_their_patches(monkeypatch, side, channels, kernel, stride, padding):
    kernels = pytest.importorskip("shiftaddvit.ops.patch_embed.triton")
    cuts = []

    def four(m, n, kernel, run, device):
        cuts.append(m)
        return 4

    monkeypatch.setattr(kernels, "parts_for", four)
    torch.manual_seed(0)
    x, weight, bias = torch.randn(3, side * side, channels), torch.randn(40, channels, kernel, kernel) / 10, torch.randn(40)
    norm, prefix = (torch.randn(40), torch.randn(40)), torch.randn(1, 40)
    pictures = x.double().transpose(1, 2).reshape(3, channels, side, side)
    expected = F.conv2d(pictures, weight.double(), bias.double(), stride, padding).flatten(2).transpose(1, 2)
    expected = F.layer_norm(expected, (40,), norm[0].double(), norm[1].double(), 1e-6)
    expected = torch.cat([prefix.expand(3, 1, -1).double(), expected], 1)
    with poisoned_outputs():
        y = patch_embed(x, weight, bias, stride, padding, (side, side), norm=norm, prefix=prefix, backend="triton")
    assert cuts and error(y, expected) < 2e-6


def test_parts_fill_the_device_and_are_one_where_tokens_do(monkeypatch):
    kernels = pytest.importorskip("shiftaddvit.ops.patch_embed.triton")
    monkeypatch.setattr(kernels, "processors", lambda device: 132)
    device = torch.device("cpu")
    assert kernels.parts_for(49, 256, 3, 480, device) == 16 and kernels.parts_for(49, 32, 8, 256, device) == 32
    assert kernels.parts_for(12544, 256, 3, 480, device) == 1 and kernels.parts_for(784, 64, 3, 96, device) == 1


@pytest.mark.parametrize(("rows", "out_h", "out_w", "across"), [(128, 56, 56, 64), (16, 5, 7, 16), (64, 14, 14, 16), (32, 3, 100, 32)])
def test_tiles_of_pictures_waste_few_tokens(rows, out_h, out_w, across):
    kernels = pytest.importorskip("shiftaddvit.ops.patch_embed.triton")
    assert kernels.columns_across(rows, out_h, out_w) == across


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(1, 1, 0), (2, 3, 1), (3, 2, 1), (16, 16, 0), (14, 14, 0), (9, 4, 4)])
@pytest.mark.parametrize("step", [16, 64, 128])
def test_windows_of_any_side_in_steps_of_any_length(monkeypatch, kernel, stride, padding, step):
    kernels = pytest.importorskip("shiftaddvit.ops.patch_embed.triton")
    tile = kernels.Tile(64, 32, max(step, kernels.padded_side(kernel)), 4, 1 + step // 64)
    monkeypatch.setattr(kernels, "picture_tile", lambda *problem: tile)
    torch.manual_seed(0)
    x, weight = torch.randn(2, 5, 19, 17), torch.randn(40, 5, kernel, kernel) / 10
    expected = F.conv2d(x.double(), weight.double(), None, stride, padding).flatten(2).transpose(1, 2)
    with poisoned_outputs():
        y = patch_embed(x, weight, None, stride, padding, backend="triton")
    assert error(y, expected) < 2e-6


@pytest.mark.parametrize("planes", [True, False])
@pytest.mark.parametrize("kernel", [1, 3, 7, 8])
def test_a_flat_weight_can_be_unflattened(kernel, planes):
    weight = torch.randn(5, 3, kernel, kernel)
    flat = flatten_weight(weight, planes)
    assert flat.is_contiguous() and torch.equal(unflatten_weight(flat, kernel, planes), weight)


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
