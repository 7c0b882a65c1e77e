"""Attention over binary codes: parity with the published one and with the formulas, batch independence, hash functions."""

import math
import pickle
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from attention_layers import ADDS, attention
from torch import nn

from shiftaddvit.baselines.ecoformer import EcoformerAttention
from shiftaddvit.errors import UserError
from shiftaddvit.layers import AngularAttention, AngularConfig, BinaryConfig, HashConfig, KernelHash

torch.set_num_threads(1)
GOLDEN = Path(__file__).parent / "golden"


def test_published_binary_attention_in_value_and_gradients():
    data = {key: torch.from_numpy(value) for key, value in np.load(GOLDEN / "linangular_binary.npz").items()}
    heads = int(data["heads"])
    binary = BinaryConfig(threshold="tensor", published_window=True)
    layer = AngularAttention(nn.Linear(64, 192), nn.Linear(64, 64), heads, 64 // heads, binary, AngularConfig.published())
    ours = {"qkv": layer.qkv, "proj": layer.proj, "dconv": layer.token_conv}
    for key in (key for key in data if key.startswith("w.")):
        module, name = key[2:].split("/")
        getattr(ours[module], name).data.copy_(data[key])
    x = data["x"].clone().requires_grad_()
    y = layer(x)
    y.backward(data["grad_y"])
    torch.testing.assert_close(y.detach(), data["y"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(x.grad, data["grad_x"], rtol=1e-4, atol=1e-5)
    for key in (key for key in data if key.startswith("g.")):
        module, name = key[2:].split("/")
        torch.testing.assert_close(getattr(ours[module], name).grad, data[key], rtol=1e-4, atol=1e-4, msg=key)


@pytest.mark.parametrize("local", ["own", "mean", "none"])
@pytest.mark.parametrize("context", ["sum", "mean"])
def test_linear_attention_equals_the_double_loop(local, context):
    layer = attention(config=AngularConfig(local=local, context=context, output_norm="none", token_conv=0))
    x = torch.randn(2, 5, 16)
    q, k, v = layer.queries_keys_values(x)
    q, k = q / q.norm(dim=-1, keepdim=True), k / k.norm(dim=-1, keepdim=True)
    expected = torch.zeros_like(v)
    for i in range(5):
        for j in range(5):
            similarity = (q[:, :, i] * k[:, :, j]).sum(-1, keepdim=True) / math.pi / (5 if context == "mean" else 1)
            expected[:, :, i] += similarity * v[:, :, j] + (v[:, :, j] / 10 if local == "mean" else 0)
        expected[:, :, i] += v[:, :, i] / 2 if local == "own" else 0
    torch.testing.assert_close(layer.mix(*layer.encode(q, k), v), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("add", ADDS)
def test_an_image_alone_equals_the_image_in_a_batch(add):
    layer = attention(ADDS[add]).eval()
    x = torch.randn(4, 9, 16)
    x[0] *= 30
    torch.testing.assert_close(layer(x[2:3]), layer(x)[2:3], rtol=1e-5, atol=1e-6)


def test_the_published_threshold_lets_batch_mates_change_an_image():
    layer = attention(BinaryConfig(threshold="tensor")).eval()
    x = torch.randn(4, 9, 16)
    x[0] = x[0].abs() + 3
    assert (layer(x[2:3]) - layer(x)[2:3]).abs().max() > 1e-3


@pytest.mark.parametrize("add", ADDS)
def test_zero_tokens_give_finite_values_and_gradients(add):
    layer = attention(ADDS[add])
    for linear in (layer.qkv, layer.proj):
        nn.init.zeros_(linear.bias)
    x = torch.zeros(2, 9, 16, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())


def test_prefix_tokens_stay_out_of_the_raster_window():
    layer = attention(prefix=2)
    v = torch.randn(1, 2, 8, 8)
    moved = v.clone()
    moved[:, :, :2] += 1.0
    difference = layer._convolve(moved) - layer._convolve(v)
    centre = layer.token_conv.weight[:, 0, 4, 0].view(1, 2, 1, 1)
    torch.testing.assert_close(difference[:, :, :2], centre.expand(1, 2, 2, 8))
    assert (difference[:, :, 2:] == 0).all()
    # the published form lets them in
    layer.config = AngularConfig(prefix_in_conv=True)
    assert ((layer._convolve(moved) - layer._convolve(v))[:, :, 2:] != 0).any()


def test_token_convolution_is_a_window_of_neighbours_per_head():
    layer = attention(heads=2)
    v = torch.randn(1, 2, 12, 8)
    weight = layer.token_conv.weight[:, 0, :, 0]
    expected = torch.zeros_like(v)
    for token in range(12):
        for tap in range(9):
            if 0 <= token + tap - 4 < 12:
                expected[:, :, token] += weight[:, tap].view(1, 2, 1) * v[:, :, token + tap - 4]
    torch.testing.assert_close(layer.token_conv(v), expected, rtol=1e-4, atol=1e-5)


def test_token_convolution_by_taps_is_the_convolution():
    layer = attention(heads=2).token_conv
    torch.nn.init.normal_(layer.weight)
    v, upstream = torch.randn(3, 2, 5, 8, requires_grad=True), torch.randn(3, 2, 5, 8)
    found, expected = layer.by_taps(v), layer(v)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(*(torch.autograd.grad(y, (v, layer.weight), upstream) for y in (found, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_switched_off_attention_is_softmax_attention():
    layer = attention(BinaryConfig())
    layer.enabled = False
    x = torch.randn(2, 5, 16)
    q, k, v = layer.queries_keys_values(x)
    expected = ((q @ k.transpose(-2, -1)) * 8**-0.5).softmax(-1) @ v
    torch.testing.assert_close(layer(x), layer.proj(expected.transpose(1, 2).flatten(2)), rtol=1e-4, atol=1e-6)


def test_sparse_term_only_in_training():
    layer = attention(config=AngularConfig(sparse_threshold=0.02))
    x = torch.randn(1, 5, 16)
    assert (layer.train()(x) - layer.eval()(x)).abs().max() > 1e-3
    layer.config = AngularConfig()
    plain = layer(x)
    layer.config = AngularConfig(sparse_threshold=0.02)
    assert torch.equal(layer.eval()(x), plain)


def test_a_mask_is_refused():
    with pytest.raises(ValueError, match="no mask"):
        attention()(torch.randn(1, 5, 16), attn_mask=torch.ones(5, 5))


def test_ecoformer_equals_its_formula():
    layer = attention(HashConfig(bits=6, anchors=5, steps=3), cls=EcoformerAttention).eval()
    h = torch.where(torch.randn(1, 2, 7, 6) > 0, 1.0, -1.0)
    v = torch.randn(1, 2, 7, 8)
    expected = torch.empty_like(v)
    for i in range(7):
        numerator = sum((h[:, :, i] * h[:, :, j]).sum(-1, keepdim=True) * v[:, :, j] for j in range(7)) + 7 * v[:, :, i]
        expected[:, :, i] = numerator / ((h[:, :, i] * h.sum(2)).sum(-1, keepdim=True) + 7 * 7)
    torch.testing.assert_close(layer.mix(h, h, v), expected, rtol=1e-4, atol=1e-6)
    x = torch.randn(1, 7, 16)
    assert set(layer.encode(*layer.queries_keys_values(x)[:2])[0].unique().tolist()) <= {-1.0, 1.0}


def test_uncalibrated_hash_says_what_to_do():
    layer = KernelHash(2, 8, HashConfig())
    with pytest.raises(UserError, match="shiftaddvit.calibrate"):
        layer(torch.randn(1, 2, 5, 8))


def test_calibrated_hash_survives_its_state_and_a_copy():
    layer = attention(ADDS["ksh"]).hash
    fresh = KernelHash(2, 8, layer.config)
    fresh.load_state_dict(layer.state_dict())
    x = torch.randn(1, 2, 5, 8)
    for other in (fresh, deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x))


def test_hash_calibration_with_fewer_tokens_than_anchors_and_equal_by_seed():
    x = torch.randn(2, 2, 3, 8)
    layers = [KernelHash(2, 8, HashConfig(steps=2)) for _ in range(2)]
    for layer in layers:
        layer.calibrate(x, torch.Generator().manual_seed(7))
    assert torch.equal(layers[0].directions, layers[1].directions) and torch.equal(layers[0].anchors, layers[1].anchors)
    assert layers[0](x).isfinite().all()


@pytest.mark.parametrize("cls", [AngularAttention, EcoformerAttention])
def test_sums_over_tokens_stay_in_float32_under_autocast(cls):
    """Above 256 bfloat16 knows no odd number, so a sum of 300 ones tells the two apart."""
    layer = attention(HashConfig(bits=2, anchors=5, steps=1), AngularConfig(token_conv=0, context="sum", output_norm="none"), cls=cls)
    codes, v = torch.ones(1, 2, 301, 2), torch.ones(1, 2, 301, 8)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = layer.mix(codes, codes, v)
    torch.testing.assert_close(mixed, layer.mix(codes, codes, v), rtol=1e-6, atol=0)
