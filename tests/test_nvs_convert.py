"""Converting view models inherits; checkpoints refuse what does not fit."""

from dataclasses import replace

import nvs_synthetic
import pytest
import torch
from nvs_models import SHORT, TINY, seen, tiny
from torch import nn

import shiftaddvit
from shiftaddvit.errors import UserError
from shiftaddvit.layers.moe import MoEConfig, MoELinear
from shiftaddvit.layers.shift import ShiftLinear
from shiftaddvit.nvs.gnt.checkpoints import load_published
from shiftaddvit.nvs.gnt.ray_linear import RayAngularAttention
from shiftaddvit.nvs.gnt.transformer import RayAttention, ViewAttention
from shiftaddvit.nvs.nerf import NeRF, NeRFConfig
from shiftaddvit.nvs.rows import ROWS
from shiftaddvit.nvs.scene import normalise
from shiftaddvit.nvs.state import load_model, save_model
from shiftaddvit.nvs.train import train
from shiftaddvit.reparam import Recipe, recipes, reparameterize

DENSE = ("feature_net", "rgbfeat_fc", "q_fcs", "pos_fc", "attn_fc", "rgb_fc", "norm")
"""The parts of GNT that no recipe touches."""


@pytest.fixture(scope="module")
def scene():
    return normalise(nvs_synthetic.make_scene(views=6, width=36, height=32))


@pytest.mark.parametrize("row", ROWS)
def test_every_row_converts_trains_and_loads(row, scene, tmp_path):
    model = reparameterize(tiny(), recipes[row])
    train(model, [scene], tmp_path, replace(SHORT, steps=2), show=False)
    expected = model.eval().net_coarse(*seen(model))[0]
    again = load_model(tmp_path / "model.safetensors")
    assert again.shiftaddvit_recipe == recipes[row]
    assert torch.equal(again.net_coarse(*seen(again))[0], expected)
    save_model(model, tmp_path / "packed.safetensors", packed=True)
    assert torch.equal(load_model(tmp_path / "packed.safetensors").net_coarse(*seen(again))[0], expected)


@pytest.mark.parametrize("row", ROWS)
def test_conversion_touches_what_the_table_says_and_nothing_else(row):
    model, recipe = reparameterize(tiny(), row), recipes[row]
    for name, module in model.named_modules():
        if any(part in DENSE for part in name.split(".")):
            assert not isinstance(module, ShiftLinear | MoELinear), name
    kinds = {"mult": nn.Linear, "shift": ShiftLinear, "moe": MoELinear}
    block = model.net_coarse
    assert isinstance(block.view_crosstrans[0].attn.v_fc, kinds[recipe.attn_linear])
    assert isinstance(block.view_selftrans[1].ff.fc2, kinds[recipe.mlp])
    adds = [module for module in model.modules() if getattr(module, "primitive", "") == "add"]
    assert len(adds) == (2 * TINY.depth if recipe.add == "quant" else 0)


def test_conversion_with_primitives_off_is_the_dense_model():
    """Shift layers that are switched off use the latent weights: GNT-shift then is GNT."""
    dense, model = tiny().eval(), reparameterize(tiny(), "gnt-shift").eval()
    for module in model.modules():
        if isinstance(module, ShiftLinear):
            module.enabled = False
    expected, found = (one.net_coarse(*seen(one))[0] for one in (dense, model))
    assert torch.allclose(expected, found, atol=1e-5)


def test_ray_attention_with_additions_off_is_the_dense_model():
    recipe = Recipe(attention="linear", add="quant")
    dense, model = tiny().eval(), reparameterize(tiny(), recipe).eval()
    for block in model.net_coarse.view_selftrans:
        block.attn.enabled = False
    for expected, found in zip(dense.net_coarse(*seen(dense)), model.net_coarse(*seen(model)), strict=True):
        assert torch.allclose(expected, found, atol=1e-5)


def test_every_converted_parameter_receives_gradient():
    model = reparameterize(tiny(config=replace(TINY, dropout=0.0)), "gnt-add-shift-moe").train()
    model.net_coarse(*seen(model, 64))[0].square().sum().backward()
    for name, parameter in model.net_coarse.named_parameters():
        assert parameter.grad is not None, f"no gradient for {name}"


def test_conversion_refuses_what_it_has_no_form_of():
    for recipe in (Recipe(attention="linear", add="ksh"), Recipe(attention="ecoformer")):
        model = tiny()
        with pytest.raises(UserError, match="view_selftrans.0.attn .RayAttention. takes attention 'keep' or 'linear'"):
            reparameterize(model, recipe)
        assert isinstance(model.net_coarse.view_selftrans[0].attn, RayAttention)
    with pytest.raises(UserError, match="already converted"):
        reparameterize(reparameterize(tiny(), "gnt-add"), "gnt-add")
    with pytest.raises(UserError, match="override pattern 'blocks.0'"):
        reparameterize(tiny(), Recipe(mlp="shift", overrides=(("blocks.0", {"mlp": "mult"}),)))
    with pytest.raises(UserError, match="no attention or MLP found in NeRF"):
        reparameterize(NeRF(NeRFConfig(width=16)), "gnt-add")


def test_the_one_verb_converts_gnt_and_reports_every_linear():
    model = shiftaddvit.reparameterize(tiny(), "gnt-add-shift-moe")
    report = model.shiftaddvit_report
    attention, feed = "net_coarse.view_selftrans.0.attn", "net_coarse.view_crosstrans.1.ff"
    assert (f"{attention}.k_fc", f"{attention}.qkv[k]") in report.used and (f"{attention}.out_fc", f"{attention}.proj") in report.used
    assert (f"{attention}.token_conv.weight", "zeros") in report.made
    assert any(name == f"{feed}.fc2.weight" and "mult, shift" in target for name, target in report.used)


def test_view_attention_keeps_its_subtraction_whatever_the_recipe():
    model = reparameterize(tiny(), Recipe(attention="linear", attn_linear="shift"))
    assert isinstance(model.net_coarse.view_crosstrans[0].attn, ViewAttention)
    assert isinstance(model.net_coarse.view_selftrans[0].attn, RayAngularAttention)


def test_one_router_for_a_whole_feed_forward_starts_as_the_dense_model():
    dense = tiny().eval()
    model = reparameterize(tiny(), Recipe(mlp="moe", moe=MoEConfig(experts=("mult", "mult"), router="mlp"))).eval()
    with torch.no_grad():
        assert torch.allclose(dense.net_coarse(*seen(dense))[0], model.net_coarse(*seen(model))[0], atol=1e-6)


def test_overrides_reach_one_block():
    recipe = Recipe(mlp="shift", overrides=(("net_coarse.view_crosstrans.0.*", {"mlp": "mult"}),))
    model = reparameterize(tiny(), recipe)
    assert isinstance(model.net_coarse.view_crosstrans[0].ff.fc1, nn.Linear)
    assert isinstance(model.net_coarse.view_crosstrans[1].ff.fc1, ShiftLinear)


def published(model, path):
    parts = {"net_coarse": model.net_coarse.state_dict(), "feature_net": model.feature_net.state_dict()}
    torch.save(parts | {"optimizer": {}}, path)


def test_published_checkpoints_load_with_their_own_shape(tmp_path):
    model = tiny(config=replace(TINY, depth=3))
    published(model, tmp_path / "model.pth")
    found = load_published(tmp_path / "model.pth")
    assert (found.config.width, found.config.depth, found.config.feature_base) == (16, 3, 4)
    for name, value in model.state_dict().items():
        assert torch.equal(value, found.state_dict()[name]), name


@pytest.mark.parametrize(("field", "value"), [("width", 64), ("depth", 8)])
def test_a_checkpoint_for_another_shape_is_refused(tmp_path, field, value):
    published(tiny(), tmp_path / "model.pth")
    with pytest.raises(UserError, match=f"of {field} {getattr(TINY, field)}, but {field} {value} was asked"):
        load_published(tmp_path / "model.pth", replace(TINY, **{field: value}))


def test_broken_checkpoints_are_named(tmp_path):
    (tmp_path / "a.pth").write_bytes(b"nothing")
    with pytest.raises(UserError, match="a.pth is not a whole checkpoint"):
        load_published(tmp_path / "a.pth")
    torch.save({"state": {}}, tmp_path / "b.pth")
    with pytest.raises(UserError, match="must hold 'net_coarse'"):
        load_published(tmp_path / "b.pth")
    save_model(tiny(), tmp_path / "c.safetensors")
    data = (tmp_path / "c.safetensors").read_bytes()
    (tmp_path / "c.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="c.safetensors is not a whole safetensors file"):
        load_model(tmp_path / "c.safetensors")
