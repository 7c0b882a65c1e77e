"""PVTv1: parity with the published implementation, its key names, and timm's interface."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from torch import nn

import shiftaddvit.models  # noqa: F401  (registers PVTv1)
from shiftaddvit.errors import UserError
from shiftaddvit.models import PyramidVisionTransformer
from shiftaddvit.models.pvt_v1 import resize_positions
from shiftaddvit.serialization import load, save

GOLDEN = Path(__file__).parent / "golden" / "pvt_v1.npz"


def small_pvt(**changes) -> PyramidVisionTransformer:
    args = {"img_size": 64, "num_classes": 5, "embed_dims": (16, 32, 40, 64), "depths": (1, 1, 1, 1), "mlp_ratios": (2, 2, 2, 2)}
    return PyramidVisionTransformer(**(args | changes))


def golden_pvt() -> tuple[PyramidVisionTransformer, dict]:
    data = dict(np.load(GOLDEN))
    sizes = {key: data[key].tolist() for key in ("embed_dims", "num_heads", "mlp_ratios", "depths", "sr_ratios")}
    model = PyramidVisionTransformer(img_size=64, num_classes=11, **sizes)
    weights = {key[2:].replace("/", "."): torch.from_numpy(value) for key, value in data.items() if key.startswith("w.")}
    model.load_state_dict(weights, strict=True)
    return model.eval(), data


def test_published_weights_give_the_published_logits():
    model, data = golden_pvt()
    with torch.no_grad():
        logits = model(torch.from_numpy(data["x"]))
    # Tight enough to tell the blocks' epsilon of 1e-6 from 1e-5, which is off by 6e-6.
    torch.testing.assert_close(logits, torch.from_numpy(data["y"]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "keys", "millions"), [("pvt_tiny", 161, 13.23), ("pvt_small", 301, 24.49)])
def test_registered_size_has_the_published_keys_and_parameters(name, keys, millions):
    with torch.device("meta"):
        model = timm.create_model(name)
    state = model.state_dict()
    assert len(state) == keys
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.01)
    assert state["pos_embed4"].shape == (1, 50, 512) and state["pos_embed1"].shape == (1, 3136, 64)
    assert model.default_cfg["architecture"] == name and model.pretrained_cfg["crop_pct"] == 0.9


@pytest.mark.parametrize("name", ["pvt_medium", "pvt_large"])
def test_larger_sizes_are_registered(name):
    assert timm.is_model(name)


def test_create_model_takes_class_count_image_size_and_drop_path():
    model = timm.create_model("pvt_tiny", num_classes=10, img_size=64, drop_path_rate=0.1)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for i in range(1, 5) for block in getattr(model, f"block{i}")]
    assert rates == pytest.approx(np.linspace(0, 0.1, 8).tolist())
    assert model(torch.rand(2, 3, 64, 64)).shape == (2, 10)


def test_every_parameter_receives_gradient():
    model = small_pvt()
    model(torch.rand(2, 3, 64, 64)).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_the_forward_is_one_graph():
    model, x = small_pvt().eval(), torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), model(x))


def test_gradient_checkpointing_gives_the_same_gradients():
    model, x = small_pvt(), torch.rand(2, 3, 64, 64)
    model(x).sum().backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.set_grad_checkpointing()
    model(x).sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, plain[name], msg=name)


def test_only_the_last_stage_has_a_class_token():
    model = small_pvt()
    seen = {}
    for i in range(1, 5):
        getattr(model, f"block{i}")[0].register_forward_hook(lambda m, args, out, i=i: seen.update({i: out.shape[1]}))
    tokens = model.forward_features(torch.rand(1, 3, 64, 64))
    assert seen == {1: 256, 2: 64, 3: 16, 4: 5} and tokens.shape == (1, 5, 64)


def test_head_pools_the_class_token_the_mean_or_nothing():
    model = small_pvt().eval()
    tokens = torch.rand(2, 5, 64)
    torch.testing.assert_close(model.forward_head(tokens, pre_logits=True), tokens[:, 0])
    model.reset_classifier(3, "avg")
    torch.testing.assert_close(model.forward_head(tokens), model.head(tokens[:, 1:].mean(1)))
    model.reset_classifier(0, "")
    assert isinstance(model.get_classifier(), nn.Identity) and model.forward_head(tokens).shape == (2, 5, 64)


def test_another_image_size_interpolates_positions_and_keeps_the_class_row():
    position = torch.rand(1, 1 + 16, 8)
    resized = resize_positions(position, (4, 4), (8, 6), 1)
    assert resized.shape == (1, 49, 8)
    torch.testing.assert_close(resized[:, 0], position[:, 0])
    # Bilinear without aligned corners: an output column at the input's own centre keeps its value.
    flat = torch.arange(4.0).repeat(4).reshape(1, 16, 1)
    row = resize_positions(flat, (4, 4), (4, 8), 0)[0, :8, 0]
    torch.testing.assert_close(row, torch.tensor([0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3.0]))


def test_a_larger_image_equals_a_model_built_for_it_with_resampled_positions():
    small = small_pvt(img_size=64).eval()
    large = small_pvt(img_size=96).eval()
    state = small.state_dict()
    for i, (old, new) in enumerate(((16, 24), (8, 12), (4, 6), (2, 3)), start=1):
        state[f"pos_embed{i}"] = resize_positions(state[f"pos_embed{i}"], (old, old), (new, new), int(i == 4))
    large.load_state_dict(state)
    x = torch.rand(1, 3, 96, 96)
    torch.testing.assert_close(small(x), large(x))


@pytest.mark.parametrize("size", [(16, 64), (2, 64)])
def test_an_image_smaller_than_the_reduction_is_an_error_that_names_the_size(size):
    with pytest.raises(UserError, match=rf"\({size[0]}, {size[1]}\).*stage 1.*32 pixels"):
        small_pvt()(torch.rand(1, 3, *size))
    with pytest.raises(UserError, match="img_size.*too small"):
        small_pvt(img_size=size)


def test_32_pixels_is_the_smallest_image():
    assert small_pvt(img_size=32)(torch.rand(1, 3, 32, 32)).shape == (1, 5)


def test_features_only_gives_the_maps_of_the_stages_asked_for():
    model = timm.create_model("pvt_tiny", features_only=True, out_indices=(1, -1), img_size=64)
    assert model.feature_info.channels() == [128, 512] and model.feature_info.reduction() == [8, 32]
    assert [tuple(f.shape) for f in model(torch.rand(1, 3, 64, 64))] == [(1, 128, 8, 8), (1, 512, 2, 2)]


def test_intermediates_and_final_features_agree():
    model, x = small_pvt().eval(), torch.rand(1, 3, 64, 64)
    final, maps = model.forward_intermediates(x, norm=True)
    torch.testing.assert_close(final, model.forward_features(x))
    torch.testing.assert_close(maps[-1].flatten(2).transpose(1, 2), final[:, 1:])
    assert len(maps) == 4


def test_layer_decay_groups_cover_every_parameter_and_the_class_token_has_no_weight_decay():
    model = small_pvt()
    groups = param_groups_layer_decay(model, weight_decay=0.05, no_weight_decay_list=model.no_weight_decay())
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert decay[id(model.cls_token)] == 0 and decay[id(model.pos_embed1)] == 0.05


def test_a_saved_model_of_another_image_size_comes_back_with_the_same_logits(tmp_path):
    model = timm.create_model("pvt_tiny", num_classes=3, img_size=(64, 32)).eval()
    save(model, tmp_path / "a.safetensors")
    x = torch.rand(1, 3, 64, 32)
    with torch.no_grad():
        torch.testing.assert_close(load(tmp_path / "a.safetensors")(x), model(x), rtol=0, atol=0)


def test_mistakes_are_named():
    with pytest.raises(UserError, match="load_pretrained"):
        timm.create_model("pvt_tiny", pretrained=True)
    with pytest.raises(UserError, match="global_pool"):
        small_pvt(global_pool="max")
    with pytest.raises(UserError, match="sr_ratios must end with 1"):
        small_pvt(sr_ratios=(8, 4, 2, 2))
    with pytest.raises(UserError, match="embed_dims must be multiples of num_heads, got 33 for 2 heads"):
        small_pvt(embed_dims=(16, 33, 40, 64))
    with pytest.raises(UserError, match="feature indices"):
        small_pvt().forward_intermediates(torch.rand(1, 3, 64, 64), indices=[4])
