"""Loading published weights: every layout gives the same logits as its source, and every key is accounted for."""

import argparse
import re
from collections.abc import Callable

import pytest
import timm
import torch
from checkpoint_layouts import State, hugging_face_pvt1, hugging_face_pvt2, hugging_face_vit, logits, make, official_pvt2, save, unchanged
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from torch import nn

import shiftaddvit.models  # noqa: F401  (registers PVTv1)
from shiftaddvit.errors import UserError
from shiftaddvit.models import load_pretrained

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
    assert report.notes[0] == "the file holds float16 values" and model.norm.weight.dtype == torch.float32


def test_a_file_of_ours_that_stores_exact_values_short_is_not_called_rounded(tmp_path):
    source, model = make("pvt_tiny"), make("pvt_tiny")
    nn.init.ones_(source.block1[0].norm1.weight)
    shiftaddvit.save(source, tmp_path / "a.safetensors")
    notes = load_pretrained(model, tmp_path / "a.safetensors").notes
    assert len(notes) == 1 and re.match(r"tensors stored as float16: 1 of \d+, those whose values it holds exactly; nothing is lost", notes[0])
    torch.testing.assert_close(logits(model), logits(source), rtol=0, atol=0)


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
