"""The three lives of a shift layer: latent, switched off, packed."""

import pickle
from copy import deepcopy

import pytest
import torch
from torch import nn

from shiftaddvit.errors import UserError
from shiftaddvit.layers import PackedShiftLinear, ShiftConfig, ShiftLinear, pack

torch.set_num_threads(1)


SHIFTS = [
    ShiftConfig(variant=variant, bits=bits, rounding=rounding, channel_offset=offset)
    for variant in ("ps", "q") for bits in (4, 5) for rounding in ("log", "value") for offset in (True, False)
]  # fmt: skip


@pytest.mark.parametrize("config", SHIFTS, ids=lambda c: f"{c.variant}{c.bits}-{c.rounding}-{'offset' if c.channel_offset else 'plain'}")
@pytest.mark.parametrize("width", [1, 13, 24])
def test_packed_layer_equals_latent_layer(config, width):
    torch.manual_seed(width)
    linear = nn.Linear(width, 7)
    linear.weight.data *= torch.tensor([1e-40, 1e-3, 0.0, 1.0, 30.0, 1.0, 1.0]).view(7, 1)
    linear.weight.data[5, 0] = 0
    latent = ShiftLinear.from_linear(linear, config)
    with torch.no_grad():  # training leaves the integers, and flips some signs to zero
        for parameter in latent.latent_parameters():
            parameter += 0.6 * torch.randn_like(parameter)
    packed = PackedShiftLinear.from_shift(latent)
    x = torch.randn(3, 5, width)
    assert torch.equal(packed.weight, latent.weight)
    assert torch.equal(packed(x), latent(x))
    for copy in (deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert torch.equal(copy(x), latent(x))
    fresh = PackedShiftLinear(width, 7, True, config)
    fresh.load_state_dict(packed.state_dict())
    assert torch.equal(fresh(x), latent(x))


def test_packed_fixed_point_layer_equals_latent_layer():
    layer = ShiftLinear.from_linear(nn.Linear(8, 4), ShiftConfig(fixed_point=True))
    x = torch.randn(3, 8)
    assert torch.equal(PackedShiftLinear.from_shift(layer)(x), layer(x))
    assert not torch.equal(ShiftLinear.from_linear(nn.Linear(8, 4))(x), layer(x))


@pytest.mark.parametrize("config", [ShiftConfig(bits=3), ShiftConfig(bits=6), ShiftConfig(variant="q", published_range=True)])
def test_what_cannot_be_packed_is_refused(config):
    with pytest.raises(UserError, match="cannot be packed"):
        PackedShiftLinear.from_shift(ShiftLinear(8, 4, config=config))


def test_pack_reaches_every_layer_and_the_layer_itself():
    layer = ShiftLinear(8, 8)
    assert isinstance(pack(deepcopy(layer)), PackedShiftLinear)
    model = nn.Sequential(layer, nn.Sequential(nn.GELU(), ShiftLinear(8, 2)))
    x = torch.randn(3, 8)
    expected = model(x)
    assert torch.equal(pack(model)(x), expected)
    assert not any(isinstance(module, ShiftLinear) for module in model.modules())


@pytest.mark.parametrize("config", SHIFTS[:2] + SHIFTS[8:10], ids=str)
def test_inherited_shift_layer_switched_off_is_the_linear_layer(config):
    linear = nn.Linear(12, 6)
    linear.weight.data[0] = 0
    layer = ShiftLinear.from_linear(linear, config)
    x = torch.randn(4, 12)
    assert (layer(x) - linear(x)).abs().max() > 1e-3
    layer.enabled = False
    torch.testing.assert_close(layer(x), linear(x), rtol=1e-5, atol=1e-6)


def test_a_fresh_shift_layer_is_mostly_nonzero():
    assert (ShiftLinear(64, 64).weight != 0).float().mean() > 0.99


@pytest.mark.parametrize("changes", [{"variant": "r"}, {"rounding": "up"}, {"bits": 9}, {"published_range": True}])
def test_shift_config_names_the_wrong_field(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        ShiftConfig(**changes)
