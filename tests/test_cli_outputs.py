"""Outputs are looked at before any work is done."""

from cli_runs import SMALL, refused, run

from shiftaddvit.portable import FORMATS


def test_export_refuses_an_output_before_it_loads_the_model(tmp_path, monkeypatch):
    def opened(*_):
        raise AssertionError("the model was opened")

    monkeypatch.setattr("shiftaddvit.cli.export.open_model", opened)
    file = tmp_path / "file"
    file.write_text("")
    refused("export", *SMALL, "--format", "onnx", "-o", tmp_path / "b0.txt", says="must end in .onnx")
    refused("export", *SMALL, "--format", "torch", "-o", "/proc/x.pt2", says="/proc/x.pt2 cannot be written")
    refused("export", *SMALL, "--format", "vectors", "--images", "quickstart", "-o", "/proc/x", says="cannot be written")
    refused("export", *SMALL, "--format", "torch", "-o", file / "x.pt2", says="cannot be written")
    refused("export", *SMALL, "--format", "torch", "--opset", 18, "-o", tmp_path / "x.pt2", says="--opset is about")
    assert list(tmp_path.iterdir()) == [file]


def test_export_knows_the_formats():
    import importlib

    assert importlib.import_module("shiftaddvit.cli.export")._FORMATS == FORMATS


def test_convert_refuses_an_output_that_cannot_be_written_and_leaves_nothing(tmp_path):
    refused("convert", *SMALL, "--recipe", "mlp-shift", "-o", "/proc/x.safetensors", says="cannot be written")
    run("convert", *SMALL, "--recipe", "mlp-shift", "-o", tmp_path / "new" / "x.safetensors")
    assert not list(tmp_path.glob("*.tmp")) and (tmp_path / "new" / "x.safetensors").is_file()
