"""Recipes end to end at tiny size: every row on every family converts, trains, saves, loads and packs."""

from copy import deepcopy

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import shiftaddvit
from shiftaddvit.errors import UserError
from shiftaddvit.layers import (
    AngularAttention, AngularConfig, BinaryConfig, HashConfig, KernelHash, MoEConfig, MoELinear, MoEMlp,
    NormedAdder, ProjectedAttention, ShiftAdder, ShiftConfig, ShiftLayer, ShiftLinear, SoftmaxAttention,
)  # fmt: skip
from shiftaddvit.layers.moe import _Mixture
from shiftaddvit.reparam import Recipe, recipes, reparameterize

torch.set_num_threads(1)
PYRAMID = {"embed_dims": (16, 16, 32, 32), "num_heads": (1, 2, 2, 2), "num_classes": 5}
FAMILIES = {
    "vit": ("vit_tiny_patch16_224", {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}),
    "pvt_v2": ("pvt_v2_b0", {**PYRAMID, "mlp_ratios": (2, 2, 2, 2), "depths": (1, 1, 1, 1)}),
    "pvt_v1": ("pvt_tiny", {**PYRAMID, "img_size": 32, "mlp_ratios": (2, 2, 2, 2)}),
}
GNT = [name for name in recipes if name.startswith("gnt")]
NAMES = [name for name in recipes if name not in GNT]
TABLE = [
    "msa", "pvt", "pvt-moe", "ecoformer", "ours-ksh-linear", "ours-ksh-add", "ours-ksh-add-shift", "ours-ksh-add-shift-moe",
    "ours-ksh-moe", "ours-quant-linear", "ours-quant-add", "ours-quant-shift", "ours-quant-moe", "attn-shift-add", "mlp-shift", "mlp-moe",
]  # fmt: skip
BASELINES = ["ecoformer", "deepshift-ps", "deepshift-q", "addernet", "adder-attention", "shiftaddnet", "performer", "sra-linear"]
PAIRS = [(name, family) for name in NAMES for family in FAMILIES if (name, family) != ("sra-linear", "vit")]


def dense(family: str) -> nn.Module:
    torch.manual_seed(0)
    return shiftaddvit.create_model(*FAMILIES[family])


def images(count: int = 3) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model.eval()(images())


def converted(family: str, recipe: Recipe | str) -> nn.Module:
    model = reparameterize(dense(family), recipe)
    shiftaddvit.calibrate(model, images())
    return model


def short_hash(name: str) -> Recipe:
    """The named recipe with few hash training steps, to be quick."""
    values = recipes[name].to_dict()
    if "hash" in values or values.get("add") == "ksh" or values.get("attention") == "ecoformer":
        values["hash"] = {"steps": 2, "anchors": 6, "bits": 4}
    return Recipe.from_dict(values)


def test_every_row_of_the_tables_is_a_named_recipe():
    assert {*TABLE, *BASELINES} <= set(recipes)
    for name in recipes:
        assert recipes[name].name == name and recipes[name].description


@pytest.mark.parametrize(("name", "family"), PAIRS)
def test_recipe_converts_trains_saves_and_packs(name, family, tmp_path):
    model = converted(family, short_hash(name) if name not in ("pvt", "pvt-moe", "msa") else name)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    output = model(images())
    F.cross_entropy(output, torch.tensor([0, 1, 4])).backward()
    lost = [key for key, p in model.named_parameters() if p.grad is None]
    broken = [key for key, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    assert not lost and not broken
    dead = [key for key, p in model.named_parameters() if "router" in key and p.grad.abs().max() == 0]
    assert not dead
    optimizer.step()
    expected = logits(model)
    assert expected.isfinite().all()
    shiftaddvit.save(model, tmp_path / "latent.safetensors")
    assert torch.equal(logits(shiftaddvit.load(tmp_path / "latent.safetensors")), expected)
    shiftaddvit.save(model, tmp_path / "packed.safetensors", packed=True)
    assert torch.equal(logits(shiftaddvit.load(tmp_path / "packed.safetensors")), expected)
    assert torch.equal(logits(model), expected)  # saving left the model alone
    loaded = shiftaddvit.load(tmp_path / "packed.safetensors")
    assert loaded.shiftaddvit_recipe.to_dict() == model.shiftaddvit_recipe.to_dict()


def switch_off(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, (ShiftLayer, NormedAdder, ShiftAdder, _Mixture, ProjectedAttention)):
            module.enabled = False
    return model


@pytest.mark.parametrize(("name", "family"), [(n, f) for n, f in PAIRS if "ksh" not in n and n not in ("ecoformer", "sra-linear")])
def test_primitives_switched_off_give_back_the_dense_model(name, family):
    model = converted(family, name)
    # A pyramid's dense form is the one without spatial reduction, where the recipe removes it.
    msa = Recipe(attention="msa", last_stage_softmax=recipes[name].last_stage_softmax)
    reference = dense(family) if recipes[name].attention == "keep" else reparameterize(dense(family), msa)
    torch.testing.assert_close(logits(switch_off(model)), logits(reference), rtol=1e-4, atol=1e-5)


def test_msa_of_a_plain_transformer_is_the_transformer():
    assert torch.equal(logits(converted("vit", "msa")), logits(dense("vit")))


def test_msa_of_a_pyramid_without_reduction_is_the_pyramid():
    """Spatial reduction of ratio 1 is no reduction, so MSA must then give the dense logits."""
    torch.manual_seed(0)
    model = shiftaddvit.create_model("pvt_v2_b0", {**FAMILIES["pvt_v2"][1], "sr_ratios": (1, 1, 1, 1)})
    expected = logits(model)
    torch.testing.assert_close(logits(reparameterize(model, "msa")), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["pvt_v1", "pvt_v2"])
def test_last_stage_keeps_softmax_attention_unless_told(family):
    for keep in (True, False):
        model = reparameterize(dense(family), Recipe(attention="linear", add="quant", last_stage_softmax=keep))
        linear = [name for name, module in model.named_modules() if isinstance(module, AngularAttention)]
        assert len(linear) == (3 if keep else 4) * (2 if family == "pvt_v1" else 1)
    if family == "pvt_v1":
        assert model.block4[0].attn.prefix_tokens == 1 and model.block1[0].attn.prefix_tokens == 0
        assert logits(model).isfinite().all()


def test_shared_projection_starts_from_the_queries():
    model = converted("vit", "ours-ksh-linear")
    rows = dense("vit").blocks[0].attn.qkv.weight
    assert torch.equal(model.blocks[0].attn.qkv.weight, torch.cat([rows[:32], rows[64:]]))
    assert ("blocks.0.attn rows of k", "queries and keys share one projection, which starts from q") in model.shiftaddvit_report.dropped


def test_pyramid_queries_keys_and_values_become_one_linear():
    model, old = converted("pvt_v2", "msa"), dense("pvt_v2")
    before = old.stages[0].blocks[0].attn
    assert torch.equal(model.stages[0].blocks[0].attn.qkv.weight, torch.cat([before.q.weight, before.kv.weight]))


def test_report_lists_what_was_used_made_and_dropped():
    report = converted("pvt_v2", "ours-quant-moe").shiftaddvit_report
    used, made, dropped = dict(report.used), dict(report.made), dict(report.dropped)
    assert used["stages.0.blocks.0.attn.q"] == "stages.0.blocks.0.attn.qkv[q]"
    assert "experts" in used["stages.0.blocks.0.mlp.fc1.weight"]
    assert made["stages.0.blocks.0.attn.token_conv.weight"] == "zeros"
    assert "stages.0.blocks.0.mlp.fc1.router.weight" in made
    assert {"stages.0.blocks.0.attn.sr", "stages.0.blocks.0.attn.norm"} <= dropped.keys()
    assert "stages.3.blocks.0.attn.token_conv.weight" not in made  # softmax there
    text = str(report)
    assert f"used: {len(report.used)}" in text and "→" in text and "stages.0.blocks.0.attn.sr" in text


@pytest.mark.parametrize("family", FAMILIES)
def test_report_accounts_for_every_parameter(family):
    """A key of the converted model either was there before, or the report says where it comes from."""
    before, model = set(dense(family).state_dict()), converted(family, "ours-quant-moe")
    report = model.shiftaddvit_report
    named = [new.split("[")[0].split(",")[0].split(".experts")[0] for _, new in report.used] + [name for name, _ in report.made]
    unknown = [
        key for key in model.state_dict()
        if key not in before and not key.endswith(".latency") and not any(key.startswith(name) for name in named)
    ]  # fmt: skip
    assert not unknown
    gone = before - set(model.state_dict())
    old = [name for name, _ in (*report.used, *report.dropped)]
    unaccounted = [key for key in gone if not any(key.startswith(name.removesuffix(".weight")) for name in old)]
    assert not unaccounted


@pytest.mark.parametrize("name", NAMES)
def test_toml_round_trip(name, tmp_path):
    recipe = recipes[name]
    (tmp_path / "again.toml").write_text(recipe.to_toml())
    assert Recipe.from_toml(tmp_path / "again.toml") == recipe
    assert reparameterize(dense("pvt_v2"), str(tmp_path / "again.toml")).shiftaddvit_recipe == recipe


text = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"], exclude_characters="\x7f"), max_size=20)


@settings(max_examples=40)
@given(
    text, st.sampled_from(["ps", "q"]), st.integers(2, 6), st.booleans(), st.sampled_from(["token", "zero", "tensor"]),
    st.floats(1e-8, 10), st.permutations(["mult", "shift", "shift"]), st.lists(st.tuples(text, st.sampled_from(["mult", "shift", "moe"])), max_size=3),
)  # fmt: skip
def test_any_recipe_survives_toml_and_json(description, variant, bits, flag, threshold, rate, experts, overrides):
    import json
    import tomllib

    recipe = Recipe(
        "linear", "quant", shift=ShiftConfig(variant, bits, channel_offset=flag), binary=BinaryConfig(threshold),
        hash=HashConfig(learning_rate=rate), moe=MoEConfig(tuple(experts), noise=flag), angular=AngularConfig(sparse_threshold=rate),
        overrides=tuple((pattern, {"mlp": value}) for pattern, value in overrides), description=description,
    )  # fmt: skip
    assert Recipe.from_dict(tomllib.loads(recipe.to_toml())) == recipe
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_overrides_by_glob_and_the_later_one_wins():
    recipe = Recipe(mlp="moe", overrides=(("blocks.0", {"mlp": "shift"}), ("*.fc2", {"mlp": "mult"}), ("blocks.1.attn*", {"attn_linear": "shift"})))
    model = reparameterize(dense("vit"), recipe)
    assert type(model.blocks[0].mlp.fc1) is ShiftLinear and type(model.blocks[0].mlp.fc2) is nn.Linear
    assert type(model.blocks[1].mlp.fc1) is MoELinear and type(model.blocks[1].mlp.fc2) is nn.Linear
    assert type(model.blocks[1].attn.qkv) is ShiftLinear and type(model.blocks[0].attn.qkv) is nn.Linear


def test_an_override_can_keep_one_attention_of_a_linear_recipe():
    for kept in ("keep", "msa"):
        recipe = Recipe("linear", "quant", "shift", "moe", overrides=(("blocks.0.attn", {"attention": kept}),))
        model = reparameterize(dense("vit"), recipe)
        assert not isinstance(model.blocks[0].attn, AngularAttention) and isinstance(model.blocks[1].attn, AngularAttention)
        assert isinstance(model.blocks[0].attn.qkv, ShiftLinear)


def test_overrides_may_complete_each_other():
    recipe = Recipe(overrides=(("blocks.1", {"add": "quant"}), ("blocks.1.attn", {"attention": "linear"})))
    model = reparameterize(dense("vit"), recipe)
    assert model.blocks[1].attn.add == BinaryConfig() and not isinstance(model.blocks[0].attn, AngularAttention)
    with pytest.raises(UserError, match="add = 'quant' for blocks.1.attn: it needs attention = 'linear' there, not 'keep'"):
        reparameterize(dense("vit"), Recipe(overrides=(("blocks.1", {"add": "quant"}),)))


def test_overrides_survive_saving(tmp_path):
    recipe = Recipe("linear", "quant", mlp="shift", overrides=(("blocks.0.*", {"attention": "keep"}), ("*.fc2", {"mlp": "moe"})))
    model = converted("vit", recipe)
    shiftaddvit.save(model, tmp_path / "m.safetensors", packed=True)
    assert torch.equal(logits(shiftaddvit.load(tmp_path / "m.safetensors")), logits(model))


def test_unmatched_glob_is_an_error_that_shows_a_name():
    model = dense("vit")
    with pytest.raises(UserError, match=r"'stages\.9\.\*'; names look like 'blocks\.0\.attn'"):
        reparameterize(model, Recipe(mlp="shift", overrides=(("stages.9.*", {"mlp": "moe"}),)))
    assert type(model.blocks[0].mlp.fc1) is nn.Linear  # nothing was changed


@pytest.mark.parametrize(("name", "hint"), [("our-quant-moe", r"did you mean 'ours-quant-moe'[^?]*\?"), ("zzz", "no name is like it;")])
def test_unknown_recipe_names_the_nearest_and_where_all_are_listed(name, hint):
    with pytest.raises(UserError, match=f"unknown recipe '{name}': {hint} 'shiftaddvit recipes' lists them all$") as refused:
        reparameterize(dense("vit"), name)
    assert sum(repr(recipe) in str(refused.value) for recipe in recipes) <= 3


def test_missing_and_broken_recipe_files_are_named(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        reparameterize(dense("vit"), str(tmp_path / "none.toml"))
    (tmp_path / "bad.toml").write_text("mlp = ")
    with pytest.raises(UserError, match="not valid TOML"):
        Recipe.from_toml(tmp_path / "bad.toml")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mpl": "shift"}, "did you mean 'mlp'"),
        ({"mlp": "add"}, "'mlp' must be one of mult, shift, moe, adder, shift-add, got 'add'"),
        ({"add": "quant"}, "needs attention = 'linear'"),
        ({"shift": {"bit": 4}}, "did you mean 'bits'"),
        ({"shift": {"bits": 9}}, "bits must be from 2 to 6"),
        ({"shift": 4}, "must be a table"),
        ({"overrides": [{"mlp": "shift"}]}, "'modules'"),
        ({"overrides": [{"modules": "*", "mpl": "shift"}]}, "did you mean 'mlp'"),
        ({"overrides": [{"modules": "*", "mlp": "add"}]}, "must be one of"),
        ({"overrides": "blocks"}, "list of tables"),
    ],
)
def test_wrong_recipes_are_explained(values, message):
    with pytest.raises(UserError, match=message):
        Recipe.from_dict(values)


def test_converting_twice_is_refused():
    model = converted("vit", "mlp-shift")
    with pytest.raises(UserError, match="already converted.*'mlp-shift'"):
        reparameterize(model, "msa")


def test_a_model_without_a_site_is_refused_by_name():
    with pytest.raises(UserError, match="ResNet"):
        reparameterize(timm.create_model("resnet10t"), "mlp-shift")


def test_a_refused_recipe_leaves_the_model_as_it_was():
    model = dense("pvt_v2")
    keys = list(model.state_dict())
    with pytest.raises(UserError, match="convolution between its linears"):
        reparameterize(model, Recipe(attention="linear", mlp="moe", moe=MoEConfig(router="mlp")))
    assert list(model.state_dict()) == keys and not hasattr(model, "shiftaddvit_recipe")


def test_one_router_for_each_mlp(tmp_path):
    model = converted("pvt_v1", Recipe(attention="msa", mlp="moe", moe=MoEConfig(router="mlp")))
    assert sum(isinstance(module, MoEMlp) for module in model.modules()) == 8
    assert not any(isinstance(module, MoELinear) for module in model.modules())
    shiftaddvit.save(model, tmp_path / "m.safetensors", packed=True)
    assert torch.equal(logits(shiftaddvit.load(tmp_path / "m.safetensors")), logits(model))


@pytest.mark.parametrize("distilled_training", [False, True])
def test_distilled_deit(distilled_training):
    args = {"embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5, "img_size": 32, "patch_size": 8}
    model = shiftaddvit.create_model("deit_tiny_distilled_patch16_224", args)
    expected = logits(model)
    model = reparameterize(model, "ours-quant-moe")
    assert model.blocks[0].attn.prefix_tokens == 2
    model.set_distilled_training(distilled_training)
    output = model.train()(images())
    assert (len(output) == 2) if distilled_training else (output.shape == (3, 5))
    model.set_distilled_training(False)
    torch.testing.assert_close(logits(switch_off(model)), expected, rtol=1e-4, atol=1e-5)


def test_pvt_v2_with_linear_reduction():
    torch.manual_seed(0)
    model = shiftaddvit.create_model("pvt_v2_b2_li", FAMILIES["pvt_v2"][1])
    model = reparameterize(model, "ours-quant-moe")
    assert "stages.0.blocks.0.attn.sr" in dict(model.shiftaddvit_report.dropped)
    assert logits(model).isfinite().all()


def test_query_and_key_norms_are_inherited():
    args = {**FAMILIES["vit"][1], "qk_norm": True}
    for name in ("ours-quant-add", "ours-ksh-add", "ecoformer"):
        model = reparameterize(shiftaddvit.create_model("vit_tiny_patch16_224", args), short_hash(name))
        attention = model.blocks[0].attn
        assert isinstance(attention.q_norm, nn.LayerNorm)
        shared = name != "ours-quant-add"
        assert isinstance(attention.k_norm, nn.Identity if shared else nn.LayerNorm)
        assert ("blocks.0.attn.k_norm" in dict(model.shiftaddvit_report.dropped)) == shared


def test_swin_converts_its_linears_and_says_why_its_attention_cannot():
    args = {"img_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 16, "depths": (1, 1), "num_heads": (2, 2), "num_classes": 5}
    model = shiftaddvit.create_model("swin_tiny_patch4_window7_224", args)
    with pytest.raises(UserError, match="relative position bias"):
        reparameterize(model, Recipe(attention="linear"))
    model = reparameterize(model, Recipe(attention="keep", attn_linear="moe", mlp="shift"))
    assert sum(isinstance(module, ShiftLinear) for module in model.modules()) == 2 * 2 + 2 * 2
    assert logits(model).isfinite().all()


def test_beit_keeps_its_own_biases():
    """Its attention reads qkv.weight and adds biases of queries and values itself."""
    args = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 5, "use_rel_pos_bias": False}
    model = shiftaddvit.create_model("beit_base_patch16_224", args)
    with pytest.raises(UserError, match="biases of queries and values"):
        reparameterize(model, Recipe(attention="linear"))
    model = reparameterize(model, Recipe(attn_linear="moe", mlp="moe"))
    assert isinstance(model.blocks[0].attn.proj, MoELinear) and isinstance(model.blocks[0].attn.qkv, nn.Linear)
    assert logits(model).isfinite().all()


@pytest.mark.parametrize("family", FAMILIES)
def test_converted_models_keep_timms_interface(family):
    model = converted(family, "ours-quant-moe").eval()
    with torch.no_grad():
        features = model.forward_features(images())
        torch.testing.assert_close(model.forward_head(features), model(images()))
        assert model.forward_head(features, pre_logits=True).shape == (3, model.num_features)
    assert isinstance(model.get_classifier(), nn.Linear)
    model.reset_classifier(7)
    assert logits(model).shape == (3, 7)


def test_calibration_is_seeded_and_leaves_the_mode_alone():
    states = []
    for seed in (0, 0, 1):
        model = reparameterize(dense("vit"), short_hash("ours-ksh-add")).train()
        assert shiftaddvit.calibrate(model, images(), seed=seed) == 2 and model.training
        states.append(torch.cat([m.directions.flatten() for m in model.modules() if isinstance(m, KernelHash)]))
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])


def test_conversion_copies_the_mode_and_leaves_other_parts_alone():
    model = dense("vit").eval()
    before = deepcopy(model.patch_embed.state_dict())
    reparameterize(model, "ours-quant-moe")
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(before[key], value) for key, value in model.patch_embed.state_dict().items())
    assert not any(isinstance(module, SoftmaxAttention) for module in model.modules())
