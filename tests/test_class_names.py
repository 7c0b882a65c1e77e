"""What the classes of a trained model are called, against what the data call theirs; and what a command says of data and files it cannot use."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_runs import ARGS, SHORT, VIT, refused, run

from shiftaddvit.cli.model_choice import settings_to_store
from shiftaddvit.data.images import ImageData
from shiftaddvit.data.sources import check_class_names
from shiftaddvit.errors import UserError
from shiftaddvit.reparam.architecture import create_model
from shiftaddvit.serialization import load, read_image_settings, save


class Named:
    """As much of a store as the check looks at."""

    def __init__(self, names: list[str] | None) -> None:
        self.classes, self.labels = names, np.arange(3)


def named_model(path: Path, *names: str) -> Path:
    torch.manual_seed(0)
    save(create_model(VIT, ARGS | {"num_classes": len(names)}), path, metadata=settings_to_store((32, 32), 1.0, list(names)))
    return path


@pytest.mark.parametrize(("data", "model"), [
    (["a", "b", "c"], ["a", "b", "c"]), (None, ["a", "b", "c"]), (["a", "b", "c"], None), (["a", "b"], ["b", "a", "c"]),
])  # fmt: skip
def test_names_that_agree_or_are_not_there_pass(data, model):
    check_class_names(ImageData(Named(data)), model, "file")


def test_the_first_class_that_differs_is_named():
    with pytest.raises(UserError, match=r"another order: label 1 is 'b' in file and 'c' in the data; 2 of 3 differ"):
        check_class_names(ImageData(Named(["a", "c", "b"])), ["a", "b", "c"], "file", others_allowed=True)
    other = ImageData(Named(["a", "b", "d"]))
    with pytest.raises(UserError, match=r"not the model's: label 2 is 'c' in file and 'd' in the data; 1 of 3 differ.*--ignore-class-names"):
        check_class_names(other, ["a", "b", "c"], "file")
    check_class_names(other, ["a", "b", "c"], "file", others_allowed=True)


def test_commands_that_measure_accuracy_compare_the_names(tmp_path, dense, data):
    turned = named_model(tmp_path / "turned.safetensors", "light", "dark")
    other, same = named_model(tmp_path / "other.safetensors", "cat", "dog"), named_model(tmp_path / "same.safetensors", "dark", "light")
    few = ("--workers", 0)
    for ignoring in ((), ("--ignore-class-names",)):
        refused("evaluate", turned, data, *few, *ignoring, says="another order")
    refused("evaluate", other, data, *few, says="label 0 is 'cat'")
    run("evaluate", other, data, *few, "--ignore-class-names")
    run("evaluate", same, data, *few, "--against", dense)
    refused("evaluate", same, data, *few, "--against", turned, says="turned.safetensors")
    refused("sensitivity", turned, data, "--primitive", "mlp-shift", "--images", 6, *few, says="another order")
    refused("search", turned, data, "--primitive", "mlp-shift", "--images", 6, *few, "-o", tmp_path / "found", "--no-figure", says="another order")
    distil = ("--recipe", "mlp-shift", "-o", tmp_path / "run", *SHORT, "--distill", 0.5)
    refused("finetune", dense, data, *distil, "--teacher", turned, says="another order")
    refused("finetune", turned, data, *distil, says="another order")
    assert not (tmp_path / "run").exists()


def test_a_head_of_another_size_leaves_the_names_behind(tmp_path):
    model = named_model(tmp_path / "two.safetensors", "dark", "light")
    run("convert", model, "--recipe", "dense", "-o", tmp_path / "same.safetensors")
    run("convert", model, "--recipe", "dense", "-o", tmp_path / "three.safetensors", "--num-classes", 3)
    assert read_image_settings(tmp_path / "same.safetensors")["classes"] == ["dark", "light"]
    assert load(tmp_path / "three.safetensors").num_classes == 3 and read_image_settings(tmp_path / "three.safetensors")["classes"] is None


def test_weights_alone_come_with_the_command_that_makes_a_model(tmp_path, dense, data):
    weights, result = tmp_path / "weights.pth", tmp_path / "result.json"
    torch.save(load(dense).state_dict(), weights)
    result.write_text(json.dumps({}))
    line = refused("evaluate", weights, data, says=f"shiftaddvit convert NAME --weights {weights} --recipe dense --output")
    assert "give timm's name" not in line
    refused("evaluate", dense, data, "--against", weights, says="shiftaddvit convert NAME")
    assert "--weights" not in refused("evaluate", dense, data, "--against", result, says="is no model that shiftaddvit saved")
    refused("dispatch", weights, data, "-o", tmp_path / "d.json", says="shiftaddvit convert NAME")
    refused("sensitivity", weights, data, says="the file with --weights")
    assert "--weights" not in refused("sensitivity", result, data, says="is no model that shiftaddvit saved")
