"""Files for other runtimes: what is written computes what the model computes, at every batch size, or is not written."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engine_models import converted, dense, images
from torch import nn
from typer.testing import CliRunner

import shiftaddvit as sav
from shiftaddvit.cli.main import app
from shiftaddvit.errors import UserError
from shiftaddvit.layers.moe import MoEConfig
from shiftaddvit.layers.shift import ShiftConfig
from shiftaddvit.portable.frozen import frozen

SHORT = dict(depths=(1, 1), embed_dims=(16, 32), num_heads=(1, 2), mlp_ratios=(2, 2), sr_ratios=(2, 1))
SMALLER = {"pvt_v2": SHORT, "pvt_v1": {}, "vit": dict(depth=1)}


def session(path: Path):
    return pytest.importorskip("onnxruntime").InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])


def in_onnxruntime(path: Path, x: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(session(path).run(None, {"images": x.numpy()})[0])


@pytest.mark.parametrize(
    ("family", "recipe", "packed"),
    [("pvt_v2", "ours-ksh-add-shift-moe", True), ("pvt_v1", "mlp-moe", False), ("vit", "ours-quant-shift", True), ("vit", "shiftaddnet", False)],
)
def test_onnxruntime_gives_the_logits_of_the_model_at_every_batch_size(family, recipe, packed, tmp_path):
    model = converted(family, recipe, **SMALLER[family])
    report = sav.export(model, tmp_path / "m.onnx", "onnx", packed=packed, images=images(8))
    assert report.same_class == report.images == 12
    for batch in (1, 3, 8):
        x = images(batch, seed=batch)
        with torch.no_grad():
            expected = model(x)
        torch.testing.assert_close(in_onnxruntime(tmp_path / "m.onnx", x), expected, rtol=0, atol=1e-3)


def test_a_dense_file_says_what_it_is_and_nothing_of_the_machine_that_wrote_it(tmp_path):
    path = tmp_path / "m.onnx"
    sav.export(dense("vit", depth=1), path, "onnx", images=images(8), metadata={"classes": ["a", "b"]})
    about = session(path).get_modelmeta().custom_metadata_map
    assert json.loads(about["classes"]) == ["a", "b"] and json.loads(about["image_size"]) == [32, 32]
    assert session(path).get_inputs()[0].shape == ["batch", 3, 32, 32] and session(path).get_outputs()[0].shape == ["batch", 7]
    assert b".py" not in path.read_bytes()


@pytest.mark.parametrize("recipe", ["deepshift-ps", "addernet", "shiftaddnet", "adder-attention", "performer"])
def test_frozen_baselines_compute_the_same_in_ordinary_operations(recipe):
    model = converted("pvt_v2", recipe, **SHORT)
    with torch.no_grad():
        for packed in (False, True):
            torch.testing.assert_close(frozen(model, packed)(images(2)), model(images(2)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("packed", [False, True])
def test_packed_and_expanded_forms_are_the_layer_bit_for_bit(packed):
    for bits in (4, 5):
        recipe = replace(sav.recipes["ours-quant-moe"], shift=ShiftConfig(bits=bits, fixed_point=bits == 4), moe=MoEConfig(gate="paper"))
        model = converted("pvt_v1", recipe)
        with torch.no_grad():
            assert torch.equal(frozen(model, packed)(images(2)), model(images(2)))


def test_the_embedded_images_get_the_same_classes_in_onnxruntime_and_packed_weights_stay_packed(tmp_path):
    from shiftaddvit.quickstart.assets import load_dense, load_images, test_loader

    data = load_images()
    model = sav.reparameterize(load_dense(), "ours-quant-shift").eval()
    first = next(iter(test_loader(data.test_images[:8], data.test_labels[:8])))[0]
    sav.export(model, tmp_path / "m.onnx", "onnx", images=first, packed=True)
    run = session(tmp_path / "m.onnx")
    with torch.no_grad():
        for x, _ in test_loader(data.test_images[::4], data.test_labels[::4]):
            expected, got = model(x), torch.from_numpy(run.run(None, {"images": x.numpy()})[0])
            assert torch.equal(got.argmax(1), expected.argmax(1))
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-3)
    dense_bytes = 4 * sum(p.numel() for p in load_dense().parameters())
    assert (tmp_path / "m.onnx").stat().st_size < 0.5 * dense_bytes


def test_torch_programs_come_back_as_the_model_and_their_settings(tmp_path):
    model = converted("vit", "ours-quant-moe", depth=1)
    sav.export(model, tmp_path / "m.pt2", "torch", images=images(3), packed=True, metadata={"classes": ["x"]})
    settings = {"shiftaddvit.json": ""}
    program = torch.export.load(tmp_path / "m.pt2", extra_files=settings).module()
    assert json.loads(settings["shiftaddvit.json"]) == {"recipe": "ours-quant-moe", "image_size": [32, 32], "classes": ["x"]}
    for batch in (1, 5):
        with torch.no_grad():
            torch.testing.assert_close(program(images(batch)), model(images(batch)))


@torch.library.custom_op("shiftaddvit_test::odd", mutates_args=())
def odd(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


@odd.register_fake
def _(x):
    return torch.empty_like(x)


class Odd(nn.Module):
    def forward(self, x):
        return odd(x)


def test_an_op_without_an_onnx_form_is_named_and_the_old_file_stays(tmp_path):
    model = dense("vit", depth=1)
    model.head = nn.Sequential(model.head, Odd())
    (tmp_path / "m.onnx").write_text("old")
    with pytest.raises(UserError, match=r"the op shiftaddvit_test\.odd has no ONNX form"):
        sav.export(model, tmp_path / "m.onnx", "onnx", images=images(8))
    assert os.listdir(tmp_path) == ["m.onnx"] and (tmp_path / "m.onnx").read_text() == "old"


class Forgetful(nn.Module):
    """Gives other logits each time."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x.mean((2, 3)) + self.calls


def test_a_program_that_computes_something_else_is_not_written(tmp_path):
    with pytest.raises(UserError, match="logits differ by 1 at batch 3, more than 0.00"):
        sav.export(Forgetful(), tmp_path / "m.pt2", "torch", images=images(2))
    assert os.listdir(tmp_path) == []


class Pyramid(nn.Module):
    def forward(self, x):
        return [x, x]


def test_wrong_names_are_told(tmp_path):
    with pytest.raises(UserError, match="unknown format 'onx': did you mean 'onnx'"):
        sav.export(nn.Identity(), tmp_path / "m.onnx", "onx")
    with pytest.raises(UserError, match=r"must end in \.onnx"):
        sav.export(nn.Identity(), tmp_path / "m.pt2", "onnx")
    with pytest.raises(UserError, match="packed and opset are about"):
        sav.export(nn.Identity(), tmp_path / "v", "vectors", packed=True)
    with pytest.raises(UserError, match="Pyramid gives more than one tensor"):
        sav.export(Pyramid(), tmp_path / "m.pt2", "torch", images=images(2))
    with pytest.raises(UserError, match="images must be"):
        sav.export(nn.Identity(), tmp_path / "m.pt2", "torch", images=torch.zeros(3, 32, 32))


def test_the_command_writes_once_and_refuses_to_replace(tmp_path):
    sav.save(
        sav.reparameterize(sav.create_model("vit_tiny_patch16_224", dict(img_size=(32, 32), depth=1, num_classes=3)), "mlp-shift"),
        tmp_path / "m.safetensors",
    )
    command = ["export", str(tmp_path / "m.safetensors"), "--format", "torch", "--output", str(tmp_path / "m.pt2")]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert "same class on 12 of 12 images" in done.output
    again = CliRunner().invoke(app, command)
    assert again.exit_code == 2 and "exists already" in again.output
    wrong = CliRunner().invoke(app, [*command[:3], "jpeg", "--output", "x"])
    assert wrong.exit_code == 2 and "allowed: onnx, torch, vectors" in wrong.output
    blind = CliRunner().invoke(app, [*command[:3], "vectors", "--output", str(tmp_path / "v")])
    assert blind.exit_code == 2 and "give --images DATA" in blind.output
