"""timm users stay at home: a converted model is used as timm's own is."""

import pickle
from copy import deepcopy

import pytest
import torch
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from timm.utils import ModelEmaV3
from timm_models import FAMILIES, PYRAMIDS, built, images
from torch import nn

import shiftaddvit
from shiftaddvit.errors import UserError
from shiftaddvit.layers import ShiftLinear
from shiftaddvit.reparam import Recipe, recipes, reparameterize

torch.set_num_threads(1)


@pytest.mark.parametrize("packed", [False, True], ids=["latent", "packed"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_features_head_and_intermediates_belong_together(family, packed):
    model, dense = built(family), built(family, None)
    model = shiftaddvit.pack(model) if packed else model
    features = model.forward_features(images())
    assert features.shape == dense.forward_features(images()).shape
    assert torch.equal(model.forward_head(features), model(images()))
    assert model.forward_head(features, pre_logits=True).shape == (2, model.num_features)
    final, maps = model.forward_intermediates(images(), indices=2, norm=family not in PYRAMIDS)
    expected = dense.forward_intermediates(images(), indices=2)[1]
    assert [one.shape for one in maps] == [one.shape for one in expected]
    if family == "pvt_v2":
        assert torch.equal(maps[-1], features) and torch.equal(final, features)
    if family == "vit":
        assert torch.equal(maps[-1].flatten(2).transpose(1, 2), features[:, 1:])


@pytest.mark.parametrize("family", FAMILIES)
def test_what_timm_tells_about_a_model_stays(family):
    model, dense = built(family), built(family, None)
    for name in ("num_classes", "num_features", "head_hidden_size", "feature_info", "pretrained_cfg", "default_cfg"):
        assert getattr(model, name) == getattr(dense, name)
    assert type(model) is type(dense) and model.default_cfg["architecture"] == FAMILIES[family][0]
    assert model.group_matcher() == dense.group_matcher()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_another_classifier_works_and_is_saved(family, tmp_path):
    for packed in (False, True):
        model = built(family)
        model = shiftaddvit.pack(model) if packed else model
        for classes in (7, 0):
            model.reset_classifier(classes)
            heads = model.get_classifier()
            for head in heads if isinstance(heads, tuple) else (heads,):
                assert isinstance(head, nn.Linear if classes else nn.Identity)
            expected = model(images())
            assert expected.shape == (2, classes or model.num_features)
            shiftaddvit.save(model, tmp_path / "m.safetensors")
            loaded = shiftaddvit.load(tmp_path / "m.safetensors")
            assert torch.equal(loaded(images()), expected) and loaded.num_classes == classes


@pytest.mark.parametrize(("family", "pool"), [("vit", "avg"), ("pvt_v1", "avg"), ("pvt_v2", "")])
@torch.no_grad()
def test_another_pooling_is_saved(family, pool, tmp_path):
    model = built(family)
    model.reset_classifier(0 if pool == "" else 4, pool)
    shiftaddvit.save(model, tmp_path / "m.safetensors")
    assert torch.equal(shiftaddvit.load(tmp_path / "m.safetensors")(images()), model(images()))


def test_a_setting_that_tensors_do_not_show_is_saved_or_refused(tmp_path):
    model = built("vit", num_heads=4)
    if hasattr(model, "_model_args"):
        shiftaddvit.save(model, tmp_path / "m.safetensors")
        assert torch.equal(shiftaddvit.load(tmp_path / "m.safetensors")(images()), model(images()))
    model = built("vit", None)
    model.blocks[1].attn.num_heads = 4
    with pytest.raises(UserError, match=r"blocks\.1\.attn\.num_heads is 4, would be 2"):
        shiftaddvit.save(model, tmp_path / "n.safetensors")
    model = built("vit")
    model.blocks[0].attn.enabled = False
    with pytest.raises(UserError, match=r"recipe say.*blocks\.0\.attn\.enabled is False"):
        shiftaddvit.save(model, tmp_path / "n.safetensors")
    assert not (tmp_path / "n.safetensors").exists()


@pytest.mark.parametrize("packed", [False, True], ids=["latent", "packed"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_pickles_and_copies_compute_the_same(family, packed, tmp_path):
    model = built(family)
    model = shiftaddvit.pack(model) if packed else model
    torch.save(model, tmp_path / "whole.pt")
    copies = [deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(tmp_path / "whole.pt", weights_only=False)]
    for copy in copies:
        assert torch.equal(copy(images()), model(images()))
        assert copy.shiftaddvit_recipe == model.shiftaddvit_recipe and copy.no_weight_decay() == model.no_weight_decay()


@pytest.mark.parametrize("family", FAMILIES)
def test_average_of_weights_by_timm(family):
    model = built(family)
    average = ModelEmaV3(model, decay=0.5)
    before = deepcopy(model.state_dict())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1.0
    average.update(model)
    shifted = {name for name, module in model.named_modules() if isinstance(module, ShiftLinear)}
    assert shifted
    for name, parameter in average.module.named_parameters():
        torch.testing.assert_close(parameter, before[name] + 0.5)
    assert average.module(images()).shape == (2, 5)


@pytest.mark.parametrize("family", FAMILIES)
def test_recomputing_blocks_gives_the_same_gradients(family):
    gradients = []
    for recompute in (False, True):
        model = built(family, Recipe.from_dict({**recipes["ours-quant-moe"].to_dict(), "moe": {"noise": False}})).train()
        model.set_grad_checkpointing(recompute)
        model(images()).square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_timms_optimisers_leave_shifts_signs_and_routers_undecayed(family):
    model = built(family)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    optimizer = create_optimizer_v2(model, opt="adamw", weight_decay=0.05)
    layered = param_groups_layer_decay(model, weight_decay=0.05, no_weight_decay_list=model.no_weight_decay(), layer_decay=0.5)
    for groups in (optimizer.param_groups, layered):
        decayed = {names[id(p)] for group in groups if group["weight_decay"] for p in group["params"]}
        assert sum(len(group["params"]) for group in groups) == len(names)
        assert not {name for name in decayed if name.endswith((".shift", ".sign", "router.weight", "token_conv.weight"))}
        assert any(name.endswith("experts.0.weight") for name in decayed)
    scales = {names[id(p)]: group["lr_scale"] for group in layered for p in group["params"]}
    early, late = (
        ("blocks.0.", "blocks.1.") if family in ("vit", "deit") else ("block1.", "block4.") if family == "pvt_v1" else ("stages.0.", "stages.3.")
    )
    for ending in ("mlp.fc1.experts.1.shift", "attn.qkv.router.weight" if family in ("vit", "deit") else "mlp.fc2.router.weight"):
        first = {scale for name, scale in scales.items() if name.startswith(early) and name.endswith(ending)}
        last = {scale for name, scale in scales.items() if name.startswith(late) and name.endswith(ending)}
        assert len(first) == len(last) == 1 and min(first) < min(last)


def test_one_graph_for_the_whole_model():
    """fullgraph: no break at routers, codes or shifts; traced by torch.compile, run without a compiler."""
    model = built("vit", Recipe.from_dict({**recipes["ours-quant-moe"].to_dict(), "moe": {"noise": False}}), depth=1).train()
    torch._dynamo.reset()
    compiled = torch.compile(deepcopy(model), fullgraph=True, backend="eager")
    outputs = [network(images()) for network in (model, compiled)]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-5)
    for output in outputs:
        output.square().sum().backward()
    for (name, ours), theirs in zip(model.named_parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(theirs.grad, ours.grad, rtol=1e-3, atol=1e-4, msg=name)


@torch.no_grad()
def test_one_graph_for_a_packed_model():
    model = shiftaddvit.pack(built("vit", depth=1))
    torch._dynamo.reset()
    compiled = torch.compile(deepcopy(model), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images()), model(images()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("recipe", ["ours-quant-moe", "ours-quant-shift", "ecoformer", "ours-ksh-add"])
@torch.no_grad()
def test_lower_precision_by_autocast_or_as_a_whole(recipe, dtype):
    quick = Recipe.from_dict({**recipes[recipe].to_dict(), "hash": {"steps": 2, "anchors": 6, "bits": 4}})
    model = built("pvt_v1", quick)
    shiftaddvit.calibrate(model, images())
    exact = model(images())
    with torch.autocast("cpu", dtype):
        found = [model(images())]
    found.append(deepcopy(model).to(dtype)(images().to(dtype)))
    found.append(shiftaddvit.pack(deepcopy(model)).to(dtype)(images().to(dtype)))
    half = built("pvt_v1", None).to(dtype)
    reparameterize(half, quick)
    shiftaddvit.calibrate(half, images().to(dtype))
    assert all(p.dtype == torch.float32 for m in half.modules() if isinstance(m, ShiftLinear) for p in m.latent_parameters())
    found.append(half(images().to(dtype)))
    for output in found:
        assert output.dtype == dtype and output.isfinite().all()
    for output in found[:3]:
        # A code within rounding of its threshold may fall on either side, so this is no bound of rounding errors.
        assert (output.float() - exact).norm() < 0.1 * exact.norm()


def test_autocast_trains():
    model = built("deit").train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(images()).float().square().sum()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
