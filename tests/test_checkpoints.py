"""Loading published weights: every layout gives the same logits as its source, every key is accounted for, mistakes are named."""

import argparse
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

import shiftaddvit.models  # noqa: F401  (registers PVTv1)
from shiftaddvit.errors import UserError
from shiftaddvit.models import load_pretrained, read_weights
from shiftaddvit.reparam import reparameterize

State = dict[str, Tensor]

PVT2 = {"embed_dims": (16, 32, 40, 64), "num_heads": (1, 2, 5, 8), "depths": (1, 2, 1, 1), "mlp_ratios": (2, 2, 2, 2)}
PVT1 = PVT2 | {"img_size": 64}
VIT = {"embed_dim": 24, "depth": 2, "num_heads": 2, "img_size": 64}


def make(name: str, **args) -> nn.Module:
    """A small random model of a registered family, in evaluation mode; no parameter keeps the value that timm starts it with."""
    sizes = PVT2 if "pvt_v2" in name else VIT if "patch16" in name else PVT1
    if name == "pvt_tiny":
        sizes = {key: value for key, value in sizes.items() if key != "depths"}
    model = timm.create_model(name, **(sizes | {"num_classes": 7} | args)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def logits(model: nn.Module, size: int = 64) -> Tensor:
    with torch.no_grad():
        return model(torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1)))


def save(state: object, folder: Path, name: str = "file.pth") -> Path:
    torch.save(state, folder / name)
    return folder / name


# The inverse of what is under test, written out apart from it.


def official_pvt2(state: State) -> State:
    def key(k: str) -> str:
        k = k.replace("patch_embed.", "patch_embed1.").replace("mlp.dwconv.", "mlp.dwconv.dwconv.")
        k = re.sub(r"stages\.(\d)\.downsample", lambda m: f"patch_embed{int(m[1]) + 1}", k)
        k = re.sub(r"stages\.(\d)\.blocks", lambda m: f"block{int(m[1]) + 1}", k)
        return re.sub(r"stages\.(\d)\.norm", lambda m: f"norm{int(m[1]) + 1}", k)

    return {key(k): v for k, v in state.items()}


def split_rows(state: State, name: str, parts: tuple[str, ...]) -> State:
    """Every `….name.weight` cut into equal blocks of rows called `….part.weight`."""
    out = {}
    for key, value in state.items():
        if f".{name}." in key:
            out |= {key.replace(f".{name}.", f".{part}."): rows for part, rows in zip(parts, value.chunk(len(parts)), strict=True)}
        else:
            out[key] = value
    return out


def hugging_face_pvt2(state: State) -> State:
    def key(k: str) -> str:
        if k.startswith("head."):
            return k.replace("head.", "classifier.")
        k = re.sub(r"^patch_embed\.", "stages.0.downsample.", k)
        k = k.replace(".downsample.norm.", ".patch_embedding.layer_norm.").replace(".downsample.proj.", ".patch_embedding.proj.")
        k = re.sub(r"^(stages\.\d)\.norm\.", r"\1.layer_norm.", k)
        k = k.replace(".norm1.", ".layer_norm_1.").replace(".norm2.", ".layer_norm_2.").replace(".attn.norm.", ".attn.layer_norm.")
        k = k.replace(".attn.q.", ".attn.query.").replace(".attn.sr.", ".attn.spatial_reduction.").replace(".attn.", ".attention.")
        k = k.replace(".fc1.", ".dense1.").replace(".fc2.", ".dense2.").replace(".dwconv.", ".dwconv.dwconv.")
        return "pvt_v2.encoder." + k.replace("stages.", "layers.")

    return {key(k): v for k, v in split_rows(state, "kv", ("key", "value")).items()}


def hugging_face_pvt1(state: State) -> State:
    def key(k: str) -> str:
        if k.startswith("head."):
            return k.replace("head.", "classifier.")
        if k == "cls_token":
            return "pvt.encoder.patch_embeddings.3.cls_token"
        k = re.sub(r"^pos_embed(\d)", lambda m: f"patch_embeddings.{int(m[1]) - 1}.position_embeddings", k)
        k = re.sub(r"^patch_embed(\d)\.proj", lambda m: f"patch_embeddings.{int(m[1]) - 1}.projection", k)
        k = re.sub(r"^patch_embed(\d)\.norm", lambda m: f"patch_embeddings.{int(m[1]) - 1}.layer_norm", k)
        k = re.sub(r"^block(\d)", lambda m: f"block.{int(m[1]) - 1}", k)
        k = re.sub(r"^norm\.", "layer_norm.", k)
        k = k.replace(".norm1.", ".layer_norm_1.").replace(".norm2.", ".layer_norm_2.").replace("fc1", "dense1").replace("fc2", "dense2")
        k = k.replace("attn.proj", "attention.output.dense").replace("attn.norm", "attention.self.layer_norm")
        k = k.replace("attn.sr", "attention.self.sequence_reduction").replace("attn.q.", "attn.query.").replace("attn.", "attention.self.")
        return "pvt.encoder." + k

    return {key(k): v for k, v in split_rows(state, "kv", ("key", "value")).items()}


def hugging_face_vit(state: State, prefix: str = "vit.", version: int = 4) -> State:
    ends = {
        "cls_token": "embeddings.cls_token",
        "dist_token": "embeddings.distillation_token",
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj": "embeddings.patch_embeddings.projection",
        "norm": "layernorm",
    }
    heads = {"head": "cls_classifier", "head_dist": "distillation_classifier"} if "head_dist.weight" in state else {"head": "classifier"}
    inner = {
        4: (
            "encoder.layer.",
            *(f"attention.attention.{part}" for part in ("query", "key", "value")),
            "attention.output.dense",
            "intermediate.dense",
            "output.dense",
        ),
        5: ("layers.", "attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj", "mlp.fc1", "mlp.fc2"),
    }[version]
    names = ("blocks.", "attn.query", "attn.key", "attn.value", "attn.proj", "mlp.fc1", "mlp.fc2")

    def key(k: str) -> str:
        module, dot, leaf = k.rpartition(".") if k.endswith(("weight", "bias")) else (k, "", "")
        if module in heads:
            return heads[module] + dot + leaf
        if module in ends:
            return prefix + ends[module] + dot + leaf
        for ours, theirs in zip(names, inner, strict=True):
            module = re.sub(rf"(^|\.){re.escape(ours)}", lambda m: m[1] + theirs, module, count=1)
        return prefix + module.replace("norm1", "layernorm_before").replace("norm2", "layernorm_after") + dot + leaf

    return {key(k): v for k, v in split_rows(state, "qkv", ("query", "key", "value")).items()}


def unchanged(state: State) -> State:
    return state


CASES = [
    ("pvt_v2_b0", official_pvt2, "official PVTv2", "block2.1.mlp.dwconv.dwconv.bias"),
    ("pvt_v2_b2_li", official_pvt2, "official PVTv2", "block4.0.attn.sr.weight"),
    ("pvt_v2_b0", unchanged, "timm PVTv2", "stages.1.downsample.proj.weight"),
    ("pvt_v2_b0", hugging_face_pvt2, "Hugging Face PVTv2", "pvt_v2.encoder.layers.1.blocks.1.attention.key.weight"),
    ("pvt_v2_b2_li", hugging_face_pvt2, "Hugging Face PVTv2", "pvt_v2.encoder.layers.3.blocks.0.attention.spatial_reduction.weight"),
    ("pvt_tiny", unchanged, "official PVTv1", "block1.0.attn.sr.weight"),
    ("pvt_tiny", hugging_face_pvt1, "Hugging Face PVTv1", "pvt.encoder.block.3.1.attention.output.dense.bias"),
    ("deit_tiny_patch16_224", unchanged, "timm ViT/DeiT (and official DeiT)", "blocks.1.attn.qkv.weight"),
    ("deit_tiny_distilled_patch16_224", unchanged, "timm ViT/DeiT (and official DeiT)", "head_dist.weight"),
    ("vit_tiny_patch16_224", hugging_face_vit, "Hugging Face ViT/DeiT", "vit.encoder.layer.1.attention.attention.query.weight"),
    ("vit_tiny_patch16_224", lambda s: hugging_face_vit(s, version=5), "Hugging Face ViT/DeiT, version 5", "vit.layers.0.attention.q_proj.bias"),
    ("deit_tiny_distilled_patch16_224", lambda s: hugging_face_vit(s, "deit."), "Hugging Face ViT/DeiT", "distillation_classifier.bias"),
]


@pytest.mark.parametrize(("name", "layout", "called", "example"), CASES)
def test_layout_gives_the_logits_of_its_source_with_every_key_accounted_for(name, layout: Callable[[State], State], called, example, tmp_path):
    source, model = make(name), make(name)
    state = layout(source.state_dict())
    assert example in state
    report = load_pretrained(model, save(state, tmp_path))
    torch.testing.assert_close(logits(model), logits(source), rtol=0, atol=0)
    assert report.layout == called and not report.made and not report.dropped
    assert {key for key, _ in report.used} == set(state)
    assert {target.partition("[")[0] for _, target in report.used} == set(model.state_dict())


@pytest.mark.parametrize(
    ("layout", "keys"), [(official_pvt2, 178), (unchanged, 178), (hugging_face_pvt2, 178 + 16)], ids=["official", "timm", "hugging_face"]
)
def test_b0_has_its_published_number_of_keys(layout, keys, tmp_path):
    model = timm.create_model("pvt_v2_b0")
    state = layout(model.state_dict())
    report = load_pretrained(model, save({"model": state}, tmp_path))
    assert len(state) == len(report.used) == keys
    assert report.architecture == "pvt_v2_b0 (depths 2-2-2-2, widths 32-64-160-256)"


def test_joined_rows_are_reported_in_order(tmp_path):
    model = make("vit_tiny_patch16_224")
    report = load_pretrained(model, save(hugging_face_vit(make("vit_tiny_patch16_224").state_dict()), tmp_path))
    rows = {a: b for a, b in report.used if "layer.1" in a and a.endswith(("query.weight", "key.weight", "value.weight"))}
    assert list(rows.values()) == ["blocks.1.attn.qkv.weight[0:24]", "blocks.1.attn.qkv.weight[24:48]", "blocks.1.attn.qkv.weight[48:72]"]


@pytest.mark.parametrize("wrapper", ["model", "state_dict", "model_ema", "state_dict_ema"])
def test_wrapped_checkpoints_and_prefixes_are_unwrapped(wrapper, tmp_path):
    source, model = make("pvt_v2_b0"), make("pvt_v2_b0")
    state = {"module._orig_mod." + key: value for key, value in official_pvt2(source.state_dict()).items()}
    extra = {"epoch": 3, "args": argparse.Namespace(lr=0.1), "optimizer": {"state": {}}}
    load_pretrained(model, save({wrapper: state} | extra, tmp_path))
    torch.testing.assert_close(logits(model), logits(source), rtol=0, atol=0)


def test_averaged_weights_are_preferred_and_the_choice_is_noted(tmp_path):
    plain, averaged, model = make("pvt_v2_b0"), make("pvt_v2_b0"), make("pvt_v2_b0")
    file = save({"model": plain.state_dict(), "model_ema": averaged.state_dict()}, tmp_path)
    report = load_pretrained(model, file)
    torch.testing.assert_close(logits(model), logits(averaged), rtol=0, atol=0)
    assert "model_ema is used" in report.notes[0]


def test_safetensors_of_half_precision_load_and_say_so(tmp_path):
    source, model = make("pvt_tiny").half().float(), make("pvt_tiny")
    save_file({key: value.half() for key, value in source.state_dict().items()}, tmp_path / "a.safetensors")
    report = load_pretrained(model, tmp_path / "a.safetensors")
    torch.testing.assert_close(logits(model), logits(source), rtol=0, atol=0)
    assert "float16" in report.notes[0] and model.norm.weight.dtype == torch.float32


@pytest.mark.parametrize("name", ["pvt_v2_b0", "pvt_tiny", "deit_tiny_distilled_patch16_224"])
def test_another_class_count_starts_the_head_anew_and_keeps_the_rest(name, tmp_path):
    source, model = make(name), make(name, num_classes=3)
    report = load_pretrained(model, save(source.state_dict(), tmp_path))
    heads = [key for key in source.state_dict() if key.startswith("head")]
    assert [key for key, _ in report.made] == heads == [key for key, _ in report.dropped]
    assert "7 classes" in report.dropped[0][1] and "3 classes" in report.made[0][1]
    assert 0 < model.head.weight.std() < 0.04 and not model.head.bias.any()
    for key, value in model.state_dict().items():
        if key not in heads:
            assert torch.equal(value, source.state_dict()[key]), key


def test_another_class_count_can_be_refused_and_leaves_the_model_as_it_was(tmp_path):
    model = make("pvt_v2_b0", num_classes=3)
    before = logits(model)
    with pytest.raises(UserError, match="7 classes, the model 3.*num_classes_mismatch"):
        load_pretrained(model, save(make("pvt_v2_b0").state_dict(), tmp_path), num_classes_mismatch="error")
    assert torch.equal(logits(model), before)
    with pytest.raises(UserError, match="must be 'reset' or 'error', got 'ignore'"):
        load_pretrained(model, "any", num_classes_mismatch="ignore")


def test_a_file_without_head_and_a_model_without_head(tmp_path):
    source = make("pvt_v2_b0")
    body = {key: value for key, value in source.state_dict().items() if not key.startswith("head")}
    report = load_pretrained(make("pvt_v2_b0"), save(body, tmp_path))
    assert [key for key, _ in report.made] == ["head.weight", "head.bias"] and "no head" in report.made[0][1]
    headless = make("pvt_v2_b0", num_classes=0)
    report = load_pretrained(headless, save(source.state_dict(), tmp_path))
    assert report.dropped == (("head.weight", "the model has no head"), ("head.bias", "the model has no head")) and not report.made
    with torch.no_grad():
        x = torch.rand(1, 3, 64, 64)
        torch.testing.assert_close(headless(x), source.forward_head(source.forward_features(x), pre_logits=True))


@pytest.mark.parametrize("size", [(96, 96), (64, 96)])
def test_pvt1_of_another_image_size_computes_what_the_source_does_at_that_size(size, tmp_path):
    source, model = make("pvt_tiny"), make("pvt_tiny", img_size=size)
    report = load_pretrained(model, save(source.state_dict(), tmp_path))
    x = torch.rand(1, 3, *size)
    with torch.no_grad():
        torch.testing.assert_close(model(x), source(x))
    assert [key for key, _ in report.made] == [f"pos_embed{i}" for i in (1, 2, 3, 4)]
    assert report.made[0][1] == f"bilinear, from 16×16 to {size[0] // 4}×{size[1] // 4}"


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_vit_of_another_image_size_gets_resampled_positions(name, tmp_path):
    source, model = make(name), make(name, img_size=(96, 64))
    report = load_pretrained(model, save(source.state_dict(), tmp_path))
    prefix = source.num_prefix_tokens
    expected = resample_abs_pos_embed(source.pos_embed, [6, 4], [4, 4], prefix)
    torch.testing.assert_close(model.pos_embed, nn.Parameter(expected.detach()))
    torch.testing.assert_close(model.pos_embed[:, :prefix], source.pos_embed[:, :prefix])
    assert report.made == (("pos_embed", "bicubic, from 4×4 to 6×4"),)


def test_positions_that_are_no_square_grid_are_refused(tmp_path):
    file = save(make("deit_tiny_patch16_224", img_size=(96, 64)).state_dict(), tmp_path)
    with pytest.raises(UserError, match="pos_embed has 25 rows.*no square grid"):
        load_pretrained(make("deit_tiny_patch16_224"), file)


def test_equal_counts_on_an_oblong_grid_are_noted(tmp_path):
    model = make("deit_tiny_patch16_224", img_size=(32, 128))
    report = load_pretrained(model, save(make("deit_tiny_patch16_224").state_dict(), tmp_path))
    assert any("16 positions are taken as 2×8" in note for note in report.notes)


def test_a_distilled_file_in_a_plain_model_drops_its_token_row_and_head(tmp_path):
    source, model = make("deit_tiny_distilled_patch16_224"), make("deit_tiny_patch16_224")
    report = load_pretrained(model, save({"model": source.state_dict()}, tmp_path))
    assert {key for key, _ in report.dropped} == {"dist_token", "head_dist.weight", "head_dist.bias"}
    assert report.made == (("pos_embed", "without the distillation token's row"),)
    assert torch.equal(model.pos_embed, source.pos_embed[:, [0, *range(2, 18)]])
    assert any("distillation token" in note for note in report.notes)


def test_a_plain_file_in_a_distilled_model_is_refused(tmp_path):
    file = save(make("deit_tiny_patch16_224").state_dict(), tmp_path)
    with pytest.raises(UserError, match="missing dist_token"):
        load_pretrained(make("deit_tiny_distilled_patch16_224"), file)


@pytest.mark.parametrize(
    ("name", "layout", "epsilons"),
    [("vit_tiny_patch16_224", hugging_face_vit, "1e-12.*1e-06"), ("pvt_v2_b0", hugging_face_pvt2, "1e-06.*1e-05")],
)
def test_layer_norm_epsilon_that_differs_at_hugging_face_is_noted(name, layout, epsilons, tmp_path):
    report = load_pretrained(make(name), save(layout(make(name).state_dict()), tmp_path))
    assert len(report.notes) == 1 and re.search(f"LayerNorm epsilon.*{epsilons}", report.notes[0])


def test_pooler_and_mask_token_are_dropped_with_their_reason(tmp_path):
    state = hugging_face_vit(make("vit_tiny_patch16_224").state_dict(), prefix="")
    state |= {"pooler.dense.weight": torch.zeros(24, 24), "pooler.dense.bias": torch.zeros(24), "embeddings.mask_token": torch.zeros(1, 1, 24)}
    report = load_pretrained(make("vit_tiny_patch16_224"), save(state, tmp_path))
    assert [key for key, _ in report.dropped] == ["pooler.dense.weight", "pooler.dense.bias", "embeddings.mask_token"]


def test_report_prints_every_key_and_cannot_be_changed(tmp_path):
    report = load_pretrained(make("pvt_v2_b0", num_classes=3), save(official_pvt2(make("pvt_v2_b0").state_dict()), tmp_path))
    text = str(report)
    assert "official PVTv2, PVTv2 (depths 1-2-1-1, widths 16-32-40-64)" in text.splitlines()[0]
    assert "block2.1.mlp.dwconv.dwconv.bias → stages.1.blocks.1.mlp.dwconv.bias" in text and "head.bias · zeros" in text
    with pytest.raises(AttributeError):
        report.layout = "other"


# Mistakes.


def test_another_size_of_the_family_names_both(tmp_path):
    file = save(official_pvt2(timm.create_model("pvt_v2_b1").state_dict()), tmp_path)
    with pytest.raises(UserError, match=r"official PVTv2, pvt_v2_b1 .*the model \(pvt_v2_b0.*must be \(32, 3, 7, 7\).*and \d+ more"):
        load_pretrained(timm.create_model("pvt_v2_b0"), file)


@pytest.mark.parametrize(
    ("source", "layout", "target", "message"),
    [
        ("pvt_tiny", unchanged, "pvt_v2_b0", "looks like official PVTv1, PVTv1 .*; the model is pvt_v2_b0"),
        ("pvt_v2_b0", official_pvt2, "pvt_tiny", "looks like official PVTv2.*; the model is pvt_tiny"),
        ("vit_tiny_patch16_224", hugging_face_vit, "pvt_v2_b0", "looks like Hugging Face ViT/DeiT, ViT with 2 blocks, width 24, patch 16"),
        ("pvt_v2_b0", unchanged, "deit_tiny_patch16_224", "looks like timm PVTv2.*; the model is deit_tiny_patch16_224, ViT with 2 blocks"),
    ],
)
def test_another_architecture_is_refused_by_name(source, layout, target, message, tmp_path):
    with pytest.raises(UserError, match=message):
        load_pretrained(make(target), save(layout(make(source).state_dict()), tmp_path))


def test_unknown_layouts_are_refused_with_their_first_keys(tmp_path):
    with pytest.raises(UserError, match="fits no layout.*official PVTv2.*conv1.weight"):
        load_pretrained(make("pvt_v2_b0"), save({"conv1.weight": torch.zeros(3), "bn1.bias": torch.zeros(3)}, tmp_path))


def test_a_family_without_a_layout_loads_its_own_keys(tmp_path):
    args = {"num_classes": 7, "layers": (1, 1, 1, 1), "channels": (8, 8, 8, 8)}
    source, model = timm.create_model("resnet18", **args), timm.create_model("resnet18", **args | {"num_classes": 3})
    report = load_pretrained(model, save(source.state_dict(), tmp_path))
    assert report.layout == "the model's own keys" and [key for key, _ in report.made] == ["fc.weight", "fc.bias"]
    assert torch.equal(model.layer1[0].conv1.weight, source.layer1[0].conv1.weight)


@pytest.mark.parametrize("layout", [official_pvt2, unchanged, hugging_face_pvt2])
def test_one_key_too_many_or_too_few_is_named(layout, tmp_path):
    state = layout(make("pvt_v2_b0").state_dict())
    model = make("pvt_v2_b0")
    before = logits(model)
    with pytest.raises(UserError, match="unexpected block9.0.surprise"):
        load_pretrained(model, save(state | {"block9.0.surprise": torch.zeros(1)}, tmp_path))
    gone = next(key for key in state if "fc1.bias" in key or "dense1.bias" in key)
    with pytest.raises(UserError, match=r"missing stages.0.blocks.0.mlp.fc1.bias"):
        load_pretrained(model, save({key: value for key, value in state.items() if key != gone}, tmp_path))
    assert torch.equal(logits(model), before)


def test_a_missing_query_key_or_value_is_named(tmp_path):
    state = hugging_face_vit(make("vit_tiny_patch16_224").state_dict())
    del state["vit.encoder.layer.0.attention.attention.key.weight"]
    with pytest.raises(UserError, match="blocks.0.attn.qkv.weight is made of 3 tensors.*query.weight"):
        load_pretrained(make("vit_tiny_patch16_224"), save(state, tmp_path))


def test_a_converted_model_takes_no_dense_weights_nor_the_other_way_round(tmp_path):
    source = make("pvt_v2_b0")
    converted = reparameterize(make("pvt_v2_b0"), "ours-quant-shift")
    with pytest.raises(UserError, match="already converted; load pre-trained weights into the dense model"):
        load_pretrained(converted, save(source.state_dict(), tmp_path))
    with pytest.raises(UserError, match="already converted; give it to shiftaddvit.load"):
        load_pretrained(source, save(converted.state_dict(), tmp_path))


class RunsCode:
    """Unpickling this creates a file."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return (open, (str(self.target), "w"))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_that_would_run_code_is_refused_and_runs_none(zipped, tmp_path):
    torch.save({"model": RunsCode(tmp_path / "ran")}, tmp_path / "evil.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=r"would run code when loaded \(it calls (_io|io)\.open\)"):
        read_weights(tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors", "legacy.pth"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.9])
def test_a_truncated_file_is_named_as_such(name, share, tmp_path):
    state = {"a.weight": torch.rand(64, 64), "b.weight": torch.rand(64)}
    if name.endswith("safetensors"):
        save_file(state, tmp_path / name)
    else:
        torch.save(state, tmp_path / name, _use_new_zipfile_serialization=name != "legacy.pth")
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(UserError, match=f"{name} is not a .*truncated"):
        read_weights(tmp_path / name)


def test_a_safetensors_file_under_another_name_is_read(tmp_path):
    save_file({"a.weight": torch.ones(2)}, tmp_path / "weights.bin")
    assert torch.equal(read_weights(tmp_path / "weights.bin")["a.weight"], torch.ones(2))


def test_files_that_hold_no_weights_are_refused(tmp_path):
    np.savez(tmp_path / "arrays.npz", a=np.ones(3))
    (tmp_path / "text.pth").write_text("not weights at all")
    (tmp_path / "empty.pth").write_bytes(b"")
    torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "script.pt"))
    for name, message in (
        ("arrays.npz", "not a whole torch file"),
        ("text.pth", "not a whole torch file"),
        ("empty.pth", "is empty"),
        ("script.pt", "TorchScript"),
        ("absent.pth", "does not exist"),
        (".", "is a folder; give the file with the weights, such as .*empty.pth"),
    ):
        with pytest.raises(UserError, match=message):
            read_weights(tmp_path / name)
    for content, message in (({}, "an empty dict"), ([1], "a list"), ({"epoch": 3, "model": 4}, "'epoch' is a int")):
        with pytest.raises(UserError, match=message):
            read_weights(save(content, tmp_path))
    with pytest.raises(UserError, match="equal but for module."):
        read_weights(save({"a": torch.ones(1), "module.a": torch.ones(1)}, tmp_path))
