"""What bad input gets on the command line: exit code 2 and one line that says what to change."""

import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from cli_runs import SHORT, SMALL, VIT, refused, run, write_images
from safetensors.torch import save_file

from shiftaddvit.reparam.architecture import create_model
from shiftaddvit.serialization import load


def test_unknown_names_come_with_the_nearest_ones(tmp_path, dense, data):
    output = tmp_path / "a.safetensors"
    refused("convert", "pvt_v2_b00", "--recipe", "msa", "-o", output, says="pvt_v2_b0")
    refused("convert", dense, "--recipe", "ours-quant-mo", "-o", output, says="ours-quant-moe")
    refused("convert", dense, "--recipe", tmp_path / "none.toml", "-o", output, says="none.toml")
    refused("recipes", "ours-qant-moe", says="ours-quant-moe")
    refused("evaluate", dense, "torch/cifar11", says="torch/cifar10")
    refused("sensitivity", dense, data, "--primitive", "mlp-shft", says="mlp-shift")
    refused("finetune", dense, data, "--recipe", "msa", "-o", tmp_path / "run", "--augment", "lite", says="light")
    refused("search", dense, data, "--budget", "enrgy=0.6", "-o", tmp_path / "run", says="energy")
    refused("search", dense, data, "--primitive", "mlp-shft", "-o", tmp_path / "run", says="mlp-shift")
    refused("search", dense, "-o", tmp_path / "run", says="needs DATA")
    refused("search", dense, "--sensitivity", tmp_path / "none.json", "-o", tmp_path / "run", says="none.json")
    assert list(tmp_path.iterdir()) == []


def test_missing_and_empty_data_are_named(tmp_path, dense, data):
    refused("evaluate", dense, tmp_path / "nowhere", says="nowhere")
    (tmp_path / "empty").mkdir()
    refused("evaluate", dense, tmp_path / "empty", says="empty of images")
    refused("finetune", dense, tmp_path / "empty", "--recipe", "msa", "-o", tmp_path / "run", says="empty of images")
    assert not (tmp_path / "run").exists()


def test_data_without_validation_images_are_not_validated_on_training_images(tmp_path, dense, data):
    arguments = ("finetune", dense, data / "train", "--recipe", "mlp-shift", "-o", tmp_path / "run", *SHORT)
    refused(*arguments, says="--val")
    outcome = run(*arguments, "--val", "none")
    assert "95 % interval" not in outcome.stdout


def test_data_with_training_images_alone_come_with_the_options(tmp_path, dense, data):
    only = tmp_path / "only"
    shutil.copytree(data / "train", only / "train")
    start = ("finetune", dense, only, "--recipe", "mlp-shift", "-o", tmp_path / "run", *SHORT)
    line = refused(*start, says="has no split 'val'; it has train; give validation images with --val PATH, or --val none")
    assert line.endswith("to go without")
    assert "--val" not in refused("evaluate", dense, only, says="it has train; choose with --split")
    run(*start, "--val", data)


def _truncated(path: Path, dense: Path) -> str:
    path.write_bytes(dense.read_bytes()[:5000])
    return "not a whole safetensors file"


def _missing(path: Path, dense: Path) -> str:
    weights = load(dense).state_dict()
    del weights["blocks.1.mlp.fc1.weight"]
    save_file(weights, path)
    return "missing blocks.1.mlp.fc1.weight"


def _misshapen(path: Path, dense: Path) -> str:
    weights = load(dense).state_dict()
    save_file(weights | {"blocks.0.attn.proj.weight": torch.zeros(32, 31)}, path)
    return "blocks.0.attn.proj.weight is (32, 31), must be (32, 32)"


def _another_architecture(path: Path, dense: Path) -> str:
    save_file(create_model("pvt_v2_b0", {"num_classes": 2}).state_dict(), path)
    return "pvt_v2_b0"


class _Touches:
    """Pickled, it is a call that writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def _pickle_with_code(path: Path, dense: Path) -> str:
    path.write_bytes(pickle.dumps({"weight": _Touches(path.parent / "code was run")}, protocol=2))
    return "would run code"


@pytest.mark.parametrize("spoil", [_truncated, _missing, _misshapen, _another_architecture, _pickle_with_code])
def test_weights_that_do_not_fit_are_refused_with_the_reason(tmp_path, dense, spoil):
    weights = tmp_path / ("bad.pth" if spoil is _pickle_with_code else "bad.safetensors")
    says = spoil(weights, dense)
    refused("convert", *SMALL, "--weights", weights, "--recipe", "msa", "-o", tmp_path / "a.safetensors", says=says)
    assert list(tmp_path.iterdir()) == [weights]


def test_files_that_are_no_saved_model_are_refused(tmp_path, dense, data):
    weights = tmp_path / "weights.safetensors"
    save_file(load(dense).state_dict(), weights)
    refused("evaluate", weights, data, says="holds weights but no shiftaddvit model")
    refused("evaluate", tmp_path / "none.safetensors", data, says="does not exist")
    refused("evaluate", VIT, data, says="no file")
    refused("convert", "model.pth", "--recipe", "msa", "-o", tmp_path / "a.safetensors", says="--weights")


def test_wrong_number_of_classes_is_refused(tmp_path, dense):
    data = write_images(tmp_path / "three", ("a", "b", "c"), 1)
    refused("evaluate", dense, data, "--workers", 0, says="3 classes")
    refused("finetune", dense, data, "--recipe", "msa", "-o", tmp_path / "run", "--num-classes", 2, says="3 classes")


def test_unreadable_image_is_counted_and_strict_stops_at_it(tmp_path, dense):
    data = write_images(tmp_path / "images", count=2)
    broken = data / "val" / "dark" / "1.png"
    broken.write_bytes(b"no image")
    outcome = run("evaluate", dense, data, "--workers", 0)
    assert "1 unreadable images left out" in outcome.stdout and "3 images" in outcome.stdout
    assert str(broken) in outcome.stderr and "warning: 1 of 4" in outcome.stderr
    refused("evaluate", dense, data, "--workers", 0, "--strict", says=str(broken))


def test_nothing_is_overwritten_unless_asked(tmp_path, dense, data):
    output = tmp_path / "a.safetensors"
    output.write_bytes(b"mine")
    refused("convert", dense, "--recipe", "msa", "-o", output, says="--overwrite")
    assert output.read_bytes() == b"mine"
    run("convert", dense, "--recipe", "mlp-shift", "-o", output, "--overwrite")
    assert output.read_bytes() != b"mine"
    result = tmp_path / "out.json"
    result.write_text("mine")
    refused("evaluate", dense, data, "--json", result, says="--overwrite")
    assert result.read_text() == "mine"
    refused("finetune", dense, data, "--recipe", "msa", "-o", result, says="is a file")


def test_converted_and_packed_models_are_not_converted_again(tmp_path, dense, data):
    packed = tmp_path / "packed.safetensors"
    run("convert", dense, "--recipe", "mlp-shift", "-o", packed, "--packed")
    refused("convert", packed, "--recipe", "msa", "-o", tmp_path / "b.safetensors", says="already converted")
    refused("finetune", packed, data, "-o", tmp_path / "run", says="packed")
    refused("sensitivity", packed, data, "--workers", 0, says="already converted")


def test_settings_out_of_range_are_named(tmp_path, dense, data):
    start = ("finetune", dense, data, "--recipe", "msa", "-o", tmp_path / "run")
    refused(*start, "--epochs", 0, 0, says="--epochs")
    refused(*start, "--precision", "fp8", says="'bf16'")
    refused(*start, "--distill", 2, says="distill_weight")
    refused(*start, "--image-size", "big", says="--image-size")
    refused(*start, "--batch-size", 64, "--workers", 0, says="batch_size=64")
    refused(*start, "--resume", "--overwrite", says="exclude")
    refused("convert", VIT, "--recipe", "msa", "-o", tmp_path / "a.safetensors", "--model-arg", "depth", says="NAME=VALUE")
    refused("convert", VIT, "--recipe", "msa", "-o", tmp_path / "a.safetensors", "--model-arg", "dept=2", says="dept")
    refused("convert", *SMALL, "--recipe", "msa", "-o", tmp_path / "a.safetensors", "--model-arg", "num_heads=3", says="cannot be built")
    assert list(tmp_path.iterdir()) == []


def test_options_of_two_numbers_say_so(tmp_path, dense, data):
    start = ("finetune", dense, data, "--recipe", "msa", "-o", tmp_path / "run")
    for given in (("--epochs", 1), ("--epochs", "1,1"), ("--epochs", 1, "--batch-size", 4), ("--epochs", 1, "x")):
        refused(*start, *given, says="--epochs wants two numbers with a space between, as in --epochs 1 1 (see --help)")
    refused(*start, "--lr", "0.1,0.1", "--seed", 0, says="as in --lr 0.001 0.001")
    refused(*start, "--image-size", "32,32", says="as in 224 or 160x224, got '32,32'")
    refused(*start, "--image-size", 32, 48, says="--image-size wants one value, as in --image-size 32x48")
    assert "two" not in refused("pretrain", dense, data, "-o", tmp_path / "run", "--epochs", "x", says="--epochs")
    refused(*start, "--batch-size", "x", says="--batch-size")
    assert "two" not in refused(*start, "--batch-size", says="--batch-size")
    assert not (tmp_path / "run").exists()


def test_mistyped_commands_and_options_end_with_2():
    assert "finetune" in run("finetun", code=2).stderr
    assert "--recip" in run("convert", VIT, "--recip", "msa", code=2).stderr
