"""Weights that are the wrong ones, damaged or dangerous are refused by name, and nothing of theirs runs."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from checkpoint_layouts import hugging_face_pvt2, hugging_face_vit, logits, make, official_pvt2, save, unchanged
from safetensors.torch import save_file
from torch import nn

import shiftaddvit.models  # noqa: F401  (registers PVTv1)
from shiftaddvit.errors import UserError
from shiftaddvit.models import load_pretrained, read_weights
from shiftaddvit.reparam import reparameterize


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
    with pytest.raises(UserError, match=f"{name} is not a .*truncated") as caught:
        read_weights(tmp_path / name)
    if name.endswith(".pth"):
        assert str(caught.value).endswith(f"of another kind; it has {int(len(whole) * share)} bytes): get it again")


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
