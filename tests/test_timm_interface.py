"""timm users stay at home: a converted model is used as timm's own is, and other models of timm convert or are refused by name."""

import pickle
import socket
from copy import deepcopy

import pytest
import timm
import torch
from timm.models import FeatureListNet
from timm.models._features import FeatureGetterNet
from timm.models.vision_transformer import Attention
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from timm.utils import ModelEmaV3
from torch import multiprocessing, nn

import shiftaddvit
from shiftaddvit.errors import UserError
from shiftaddvit.layers import AngularAttention, PackedShiftLinear, Router, ShiftLinear
from shiftaddvit.reparam import Recipe, recipes, reparameterize

torch.set_num_threads(1)
PYRAMID = {"embed_dims": (16, 16, 32, 32), "num_heads": (1, 2, 2, 2), "mlp_ratios": (2, 2, 2, 2)}
PLAIN = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
FAMILIES = {
    "pvt_v2": ("pvt_v2_b0", {**PYRAMID, "depths": (1, 1, 1, 1)}),
    "pvt_v1": ("pvt_tiny", {**PYRAMID, "img_size": 32, "depths": (1, 1, 1, 1)}),
    "vit": ("vit_tiny_patch16_224", PLAIN),
    "deit": ("deit_tiny_distilled_patch16_224", PLAIN),
}
PYRAMIDS = ("pvt_v2", "pvt_v1")


def images() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def built(family: str, recipe: Recipe | str | None = "ours-quant-moe", **args) -> nn.Module:
    """By timm itself; every value differs from its initial one."""
    torch.manual_seed(0)
    name, own = FAMILIES[family]
    model = timm.create_model(name, **{"num_classes": 5, **own, **args}).eval()
    if recipe is not None:
        reparameterize(model, recipe)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return model


def same(a, b) -> bool:
    return all(map(torch.equal, a, b)) if isinstance(a, list) else torch.equal(a, b)


def attentions(model: nn.Module) -> dict[str, AngularAttention]:
    return {name: module for name, module in model.named_modules() if isinstance(module, AngularAttention)}


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


# ---- backbones


@pytest.mark.parametrize("wanted", [(0, 1, 2, 3), (1, 2), (3,)])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_features_only_before_conversion_equals_features_of_the_converted_model(family, wanted, tmp_path):
    """An extractor has other names for stages, may lack the last one, and hides the class tokens inside."""
    if family not in PYRAMIDS:
        wanted = (0, 1)
    name, args = FAMILIES[family]
    reference = built(family)
    torch.manual_seed(0)
    extractor = timm.create_model(name, features_only=True, out_indices=wanted, **args).eval()
    reparameterize(extractor, "ours-quant-moe")
    inner = {key.removeprefix("model.").replace("stages_", "stages."): key for key in extractor.state_dict()}
    weights = reference.state_dict()
    extractor.load_state_dict({inner[key]: weights[key] for key in inner})
    maps = extractor(images())
    expected = reference.forward_intermediates(images(), indices=list(wanted), intermediates_only=True)
    for one, other in zip(maps, expected, strict=True):
        torch.testing.assert_close(one, other)
    assert [one.shape[1] for one in maps] == extractor.feature_info.channels()
    assert [32 // one.shape[-1] for one in maps] == [min(32, reduction) for reduction in extractor.feature_info.reduction()]
    ours = {key.rpartition(".")[0] for key in attentions(extractor)}
    assert not any("stages_3" in key or "block4" in key for key in ours)
    shiftaddvit.save(extractor, tmp_path / "backbone.safetensors")
    assert same(shiftaddvit.load(tmp_path / "backbone.safetensors")(images()), maps)


@pytest.mark.parametrize("packed", [False, True], ids=["latent", "packed"])
@pytest.mark.parametrize("family", PYRAMIDS)
@torch.no_grad()
def test_a_converted_pyramid_becomes_a_backbone(family, packed, tmp_path):
    shiftaddvit.save(built(family), tmp_path / "m.safetensors", packed=packed)
    model = shiftaddvit.load(tmp_path / "m.safetensors")
    expected = model.forward_intermediates(images(), intermediates_only=True)
    wrap = {"pvt_v2": lambda m: FeatureListNet(m, out_indices=(0, 1, 2, 3), flatten_sequential=True), "pvt_v1": FeatureGetterNet}[family]
    backbone = wrap(deepcopy(model)) if family == "pvt_v2" else wrap(deepcopy(model), out_indices=(0, 1, 2, 3))
    assert same(backbone(images()), expected)
    assert backbone.feature_info.channels() == [16, 16, 32, 32] and backbone.feature_info.reduction() == [4, 8, 16, 32]
    assert isinstance(
        next(m for m in backbone.modules() if isinstance(m, (ShiftLinear, PackedShiftLinear))), PackedShiftLinear if packed else ShiftLinear
    )


class Detector(nn.Module):
    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone
        self.neck = nn.Conv2d(32, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.neck(self.backbone.forward_intermediates(x, indices=[-1], intermediates_only=True)[0])


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_backbone_inside_a_detector_converts_as_it_does_alone(family):
    alone = built(family)
    detector = reparameterize(Detector(built(family, None)).eval(), "ours-quant-moe")
    detector.backbone.load_state_dict(alone.state_dict())
    assert {f"backbone.{name}": module.prefix_tokens for name, module in attentions(alone).items()} == {
        name: module.prefix_tokens for name, module in attentions(detector).items()
    }
    assert torch.equal(detector(images()), detector.neck(alone.forward_intermediates(images(), indices=[-1], intermediates_only=True)[0]))


# ---- wrappers


def test_the_model_inside_a_wrapper_is_saved(tmp_path):
    model = built("vit")
    wrappers = (nn.DataParallel(model), ModelEmaV3(model), torch.compile(model, backend="eager"), torch.compile(nn.DataParallel(model), backend="eager"))
    for wrapper in wrappers:
        shiftaddvit.save(wrapper, tmp_path / "m.safetensors")
        assert torch.equal(shiftaddvit.load(tmp_path / "m.safetensors")(images()), model(images()))
    with pytest.raises(UserError, match="Sequential was not built by timm"):
        shiftaddvit.save(nn.Sequential(model), tmp_path / "n.safetensors")


def _compare_gradients(rank: int, port: int) -> None:
    torch.set_num_threads(1)  # a forked process has none of its parent's
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    quiet = Recipe.from_dict({**recipes["ours-quant-moe"].to_dict(), "moe": {"noise": False}})
    for family in ("pvt_v2", "deit"):
        alone, shared = built(family, quiet).train(), nn.parallel.DistributedDataParallel(built(family, quiet).train())
        for image in images().split(1):
            (alone(image).square().sum() / 2).backward()
        shared(images()[rank : rank + 1]).square().sum().backward()
        for (name, expected), found in zip(alone.named_parameters(), shared.parameters(), strict=True):
            torch.testing.assert_close(found.grad, expected.grad, rtol=1e-3, atol=1e-4, msg=name)
    torch.distributed.destroy_process_group()


def test_two_processes_average_every_gradient():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.start_processes(_compare_gradients, (port,), nprocs=2, start_method="fork")


# ---- other models of timm, and the users' own


SMALL = {
    "vit_small_patch14_reg4_dinov2": {"img_size": 42, "embed_dim": 32, "num_heads": 2, "depth": 2},
    "deit3_small_patch16_224": {"img_size": 32, "patch_size": 8, "embed_dim": 32, "num_heads": 2, "depth": 2},
    "vit_small_patch16_18x2_224": {"img_size": 32, "patch_size": 8, "embed_dim": 32, "num_heads": 2, "depth": 2},
    "twins_pcpvt_small": {"img_size": 32, "embed_dims": (16, 16, 32, 32), "num_heads": (1, 2, 2, 2), "depths": (1, 1, 1, 1)},
    "pit_ti_224": {"img_size": 64, "base_dims": (8, 8, 8), "depth": (1, 1, 1), "heads": (2, 2, 2)},
}


@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_other_families_convert(name, tmp_path):
    torch.manual_seed(0)
    model = shiftaddvit.create_model(name, {**SMALL[name], "num_classes": 3}).eval()
    x = torch.randn(2, 3, *([SMALL[name].get("img_size", 64)] * 2))
    reparameterize(model, "ours-quant-shift")
    expected = model(x)
    assert attentions(model) and expected.isfinite().all()
    shiftaddvit.save(model, tmp_path / "m.safetensors", packed=True)
    assert torch.equal(shiftaddvit.load(tmp_path / "m.safetensors")(x), expected)


@torch.no_grad()
def test_prefix_tokens_of_other_families():
    for name, tokens in (("vit_small_patch14_reg4_dinov2", 5), ("deit3_small_patch16_224", 1), ("pit_ti_224", 1), ("twins_pcpvt_small", 0)):
        model = reparameterize(shiftaddvit.create_model(name, SMALL[name]), "ours-quant-add")
        assert {module.prefix_tokens for module in attentions(model).values()} == {tokens}, name


@pytest.mark.parametrize(
    ("name", "args", "recipe", "says"),
    [
        ("swin_tiny_patch4_window7_224", {"depths": (1, 1)}, "ours-quant-add", "WindowAttention.*relative position bias.*attention = 'keep'"),
        ("beit_base_patch16_224", {"depth": 1}, "ours-quant-add", "relative position bias.*attention = 'keep'"),
        ("eva02_tiny_patch14_224", {"depth": 1}, "ours-quant-add", "EvaAttention.*rotary.*attention = 'keep'"),
        ("convit_tiny", {"depth": 2}, "ours-quant-shift", "no attention in a known layout.*attention = 'linear'.*attention = 'keep'"),
        ("mixer_s32_224", {}, "attn-shift-add", "MlpMixer has no attention in a known layout"),
        ("fastvit_sa12", {}, Recipe(mlp="shift"), "no MLP in a known layout.*mlp = 'shift'"),
        ("resnet10t", {}, "mlp-shift", "no attention or MLP found in ResNet.*reparam/sites.py"),
    ],
)
def test_what_cannot_convert_is_refused_by_name_and_stays_as_it_was(name, args, recipe, says):
    model = timm.create_model(name, num_classes=2, **args)
    keys = list(model.state_dict())
    with pytest.raises(UserError, match=says):
        reparameterize(model, recipe)
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "beit_base_patch16_224", "eva02_tiny_patch14_224"])
def test_their_linears_can_still_shift_and_the_report_names_those_that_do_not(name):
    small = {"swin_tiny_patch4_window7_224": {"depths": (1, 1), "embed_dim": 24}}.get(name, {"depth": 1, "embed_dim": 48, "num_heads": 2})
    model = reparameterize(timm.create_model(name, num_classes=2, **small), Recipe(attn_linear="shift", mlp="shift"))
    shifts = {key for key, module in model.named_modules() if isinstance(module, ShiftLinear)}
    left = dict(model.shiftaddvit_report.left)
    linears = {key for key, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert shifts and set(left) == {key for key in linears if not key.startswith("head")}
    assert {"swin": "layers.1.downsample.reduction", "beit": "blocks.0.attn.qkv", "eva0": "blocks.0.attn.qkv"}[name[:4]] in left
    assert f"left: {len(left)}" in str(model.shiftaddvit_report)


class OwnAttention(Attention):
    def forward(self, x, attn_mask=None, is_causal=False):
        return super().forward(x) + x


class OwnViT(timm.models.VisionTransformer):
    def forward_features(self, x):
        return 2 * super().forward_features(x)


@torch.no_grad()
def test_a_users_subclass_keeps_its_own_forward():
    torch.manual_seed(0)
    model = OwnViT(num_classes=5, **PLAIN).eval()
    plain = built("vit")
    reparameterize(model, "ours-quant-moe").load_state_dict(plain.state_dict())
    assert torch.equal(model.forward_features(images()), 2 * plain.forward_features(images()))


def test_a_users_own_attention_is_refused_and_its_linears_shift():
    model = timm.models.VisionTransformer(num_classes=5, attn_layer=OwnAttention, **PLAIN).eval()
    with pytest.raises(UserError, match=r"unknown form test_timm_interface\.OwnAttention.*linears can still shift"):
        reparameterize(model, "ours-quant-add")
    reparameterize(model, Recipe(attn_linear="shift"))
    assert isinstance(model.blocks[0].attn, OwnAttention) and isinstance(model.blocks[0].attn.qkv, ShiftLinear)


class OfficialAttention(nn.Module):
    """The signature of the authors' PVT."""

    def __init__(self, dim: int):
        super().__init__()
        self.num_heads, self.sr = 2, None
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)

    def forward(self, x, H, W):
        return self.proj(self.q(x))


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_a_copy_of_the_authors_pyramid_and_a_linear_with_a_forward_of_its_own_are_not_misread():
    with pytest.raises(UserError, match="unknown form.*OfficialAttention"):
        reparameterize(nn.ModuleDict({"attn": OfficialAttention(8)}), Recipe(attention="linear"))
    model = built("vit", None)
    model.blocks[0].mlp.fc1 = Scaled(32, 128)
    reparameterize(model, Recipe(mlp="shift"))
    assert isinstance(model.blocks[0].mlp.fc1, Scaled) and isinstance(model.blocks[1].mlp.fc1, ShiftLinear)
    assert "blocks.0.mlp.fc1" in dict(model.shiftaddvit_report.left)


def test_routers_are_where_timm_expects_parameters():
    """num_params of timm's training script counts what trains; a packed model has no shift parameters left."""
    latent, packed = built("vit", "ours-quant-shift"), shiftaddvit.pack(built("vit", "ours-quant-shift"))
    dense = built("vit", None)
    shifted = sum(dense.get_submodule(name).weight.numel() for name, module in latent.named_modules() if isinstance(module, ShiftLinear))
    count = lambda model: sum(parameter.numel() for parameter in model.parameters())  # noqa: E731
    token_convs = sum(parameter.numel() for name, parameter in latent.named_parameters() if "token_conv" in name)
    assert count(latent) == count(dense) + shifted + token_convs and count(packed) == count(dense) - shifted + token_convs
    assert not any(isinstance(module, Router) for module in latent.modules())
