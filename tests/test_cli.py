"""The command line, on six images a class and a transformer of two blocks: what each command does, and what bad input gets."""

import errno
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

import shiftaddvit.serialization
from shiftaddvit.cli.failures import resume_command, told_when_disk_is_full, told_when_memory_ends
from shiftaddvit.cli.main import app
from shiftaddvit.errors import UserError
from shiftaddvit.reparam.architecture import create_model
from shiftaddvit.schema import was_changed
from shiftaddvit.serialization import load, read_metadata, save
from shiftaddvit.train import Interrupted, NotFinite

VIT = "vit_tiny_patch16_224"
ARGS = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": 2}
SMALL = [VIT, *(part for key, value in ARGS.items() for part in ("--model-arg", f"{key}={value}"))]
SHORT = ["--epochs", "1", "1", "--batch-size", "4", "--workers", "0", "--augment", "light"]


def run(*arguments: object, code: int = 0):
    """Run a command in this process; its outcome, with stdout and stderr."""
    outcome = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if outcome.exit_code != code and outcome.exception is not None and not isinstance(outcome.exception, SystemExit):
        raise outcome.exception
    assert outcome.exit_code == code, outcome.output
    return outcome


def refused(*arguments: object, says: str) -> str:
    """Run a command that must end with 2 and one line on stderr; the line is returned."""
    outcome = run(*arguments, code=2)
    lines = [line for line in outcome.stderr.splitlines() if line and not line.startswith("warning: ")]
    assert len(lines) == 1 and lines[0].startswith("error: "), outcome.stderr
    assert says in lines[0], lines[0]
    return lines[0]


def write_images(root: Path, classes: tuple[str, ...] = ("dark", "light"), count: int = 6) -> Path:
    noise = np.random.default_rng(0)
    for split in ("train", "val"):
        for number, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = 60 + 120 * number + noise.integers(-40, 40, (32, 32, 3))
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("dense") / "dense.safetensors"
    save(create_model(VIT, ARGS | {"num_classes": 2}), path)
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data, dense) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("runs") / "run"
    outcome = run("finetune", dense, data, "--recipe", "ours-quant-moe", "-o", folder, *SHORT)
    return folder, outcome.stdout


def test_help_loads_nothing_heavy():
    code = "import sys; from shiftaddvit.cli.main import main; sys.argv = ['shiftaddvit', '--help']\ntry: main()\nexcept SystemExit: pass\n"
    code += "print('HEAVY', sorted({'torch', 'timm', 'accelerate', 'numpy.linalg', 'pyarrow'} & set(sys.modules)))"
    outcome = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "HEAVY []" in outcome.stdout
    for command in ("quickstart", "convert", "finetune", "pretrain", "evaluate", "sensitivity", "search", "energy", "recipes", "models", "nvs"):
        assert command in outcome.stdout


def test_version_is_the_packages():
    assert run("--version").stdout == f"shiftaddvit {shiftaddvit.__version__}\n"


def test_commands_of_all_parts_have_help():
    for command in ("quickstart", "recipes", "nvs"):
        assert "Usage" in run(command, "--help").stdout


# ---- what each command does


def test_convert_writes_the_model_that_the_library_makes(tmp_path, dense):
    output = tmp_path / "converted.safetensors"
    outcome = run("convert", dense, "--recipe", "ours-quant-shift", "-o", output)
    model = shiftaddvit.reparameterize(load(dense), "ours-quant-shift").eval()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(load(output)(images), model(images))
    assert "× the dense fp32 weights" in outcome.stdout and "parts keep their values" in outcome.stdout


def test_convert_without_weights_says_that_they_are_random(tmp_path):
    outcome = run("convert", *SMALL, "--recipe", "mlp-shift", "-o", tmp_path / "a.safetensors", "--num-classes", 3)
    assert "weights are random" in outcome.stdout
    assert load(tmp_path / "a.safetensors").num_classes == 3


def test_convert_takes_the_class_count_of_the_weights_and_their_values(tmp_path, dense):
    weights = tmp_path / "weights.pth"
    torch.save(load(dense).state_dict(), weights)
    run("convert", *SMALL, "--weights", weights, "--recipe", "dense", "-o", tmp_path / "a.safetensors")
    found, given = load(tmp_path / "a.safetensors").state_dict(), load(dense).state_dict()
    assert found.keys() == given.keys() and all(torch.equal(found[key], given[key]) for key in given)


def test_packed_file_is_smaller_and_has_the_same_logits(tmp_path, dense):
    latent, packed = tmp_path / "latent.safetensors", tmp_path / "packed.safetensors"
    run("convert", dense, "--recipe", "mlp-shift", "-o", latent)
    outcome = run("convert", latent, "--packed", "-o", packed)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(load(packed)(images), load(latent)(images))
    assert packed.stat().st_size < latent.stat().st_size and "packed" in outcome.stdout


def test_convert_calibrates_hash_functions_on_images(tmp_path, dense, data):
    refused("convert", dense, "--recipe", "ours-ksh-add", "-o", tmp_path / "a.safetensors", says="--calibrate")
    outcome = run("convert", dense, "--recipe", "ours-ksh-add", "-o", tmp_path / "a.safetensors", "--calibrate", data)
    assert "calibrated 2 hash functions on 8 images" in outcome.stdout
    load(tmp_path / "a.safetensors")(torch.zeros(1, 3, 32, 32))


def test_finetune_writes_a_model_that_says_what_comes_next(trained, data):
    folder, said = trained
    assert "95 % interval" in said and f"shiftaddvit evaluate {folder / 'model.safetensors'} {data}" in said
    assert {"log.jsonl", "result.json", "checkpoint.pt", "model.safetensors"} <= {file.name for file in folder.iterdir()}
    stages = json.loads((folder / "result.json").read_text())["stages"]
    assert [stage["primitives"] for stage in stages] == ["attention", "all"]
    images = json.loads(read_metadata(folder / "model.safetensors")["shiftaddvit.images"])
    assert images == {"image_size": [32, 32], "crop_pct": 1.0, "classes": ["dark", "light"]}


def test_evaluate_agrees_with_the_training_run(trained, data, tmp_path):
    folder, _ = trained
    run("evaluate", folder / "model.safetensors", data, "--workers", 0, "--json", tmp_path / "out.json")
    found = json.loads((tmp_path / "out.json").read_text())
    before = json.loads((folder / "result.json").read_text())["evaluation"]
    assert found["loss"] == pytest.approx(before["loss"], rel=1e-5) and found["correct"] == before["correct"]


def test_evaluate_compares_two_models_on_the_same_images(trained, dense, data):
    folder, _ = trained
    outcome = run("evaluate", folder / "model.safetensors", data, "--against", dense, "--workers", 0, "--json", "-")
    found = json.loads(outcome.stdout)
    assert found["paired"]["difference"] == pytest.approx(found["top1"] - found["against"]["top1"])
    assert found["images"] == 12


def test_finished_run_resumes_to_the_same_result(trained, data, dense):
    folder, _ = trained
    before = load(folder / "model.safetensors").state_dict()
    refused("finetune", dense, data, "--recipe", "ours-quant-moe", "-o", folder, *SHORT, says="--resume")
    run("finetune", dense, data, "--recipe", "ours-quant-moe", "-o", folder, *SHORT, "--resume")
    after = load(folder / "model.safetensors").state_dict()
    assert [key for key in before if not torch.equal(before[key], after[key])] == []


def test_finetune_builds_a_head_for_the_classes_of_the_data(tmp_path, dense):
    data = write_images(tmp_path / "three", ("a", "b", "c"), 2)
    outcome = run("finetune", dense, data, "--recipe", "mlp-shift", "-o", tmp_path / "run", *SHORT, "--num-classes", 3)
    assert "3 classes, the file has 2" in outcome.stdout
    assert load(tmp_path / "run" / "model.safetensors").num_classes == 3


def test_finetune_distils_from_the_model_before_conversion(tmp_path, dense, data):
    run("finetune", dense, data, "--recipe", "attn-shift-add", "-o", tmp_path / "run", *SHORT, "--distill", 0.5)
    config = json.loads((tmp_path / "run" / "result.json").read_text())["config"]
    assert config["distill_weight"] == 0.5
    refused("finetune", *SMALL, data, "--recipe", "mlp-shift", "-o", tmp_path / "no", *SHORT, "--distill", 0.5, says="random")


def test_pretrain_trains_a_dense_model(tmp_path, data):
    outcome = run("pretrain", *SMALL, data, "-o", tmp_path / "run", "--epochs", 1, "--batch-size", 4, "--workers", 0, "--augment", "none")
    assert not hasattr(load(tmp_path / "run" / "model.safetensors"), "shiftaddvit_recipe")
    assert "finetune" in outcome.stdout.partition("next:")[2]


def test_image_size_rebuilds_a_model_of_fixed_size(tmp_path, dense, data):
    outcome = run("pretrain", dense, data, "-o", tmp_path / "run", "--epochs", 1, "--batch-size", 4, "--workers", 0, "--augment", "light",
                  "--image-size", 48)  # fmt: skip
    assert "bicubic, from 4×4 to 6×6" in outcome.stdout
    assert load(tmp_path / "run" / "model.safetensors").patch_embed.img_size == (48, 48)


def test_sensitivity_has_a_row_for_every_layer_and_all_together(dense, data):
    outcome = run("sensitivity", dense, data, "--primitive", "mlp-shift", "--images", 6, "--workers", 0, "--json", "-")
    found = json.loads(outcome.stdout)
    assert [row["where"] for row in found["rows"]] == ["blocks.0.mlp", "blocks.1.mlp", "all"]
    assert found["dense"]["images"] == 6


def test_search_writes_a_recipe_that_convert_takes_and_tables_for_the_next_search(tmp_path, dense, data):
    few = ("--primitive", "attn-shift", "--primitive", "mlp-shift", "--points", 5)
    outcome = run("search", dense, data, "--budget", "energy=0.9", "-o", tmp_path / "a", *few, "--images", 6, "--workers", 0)
    assert "energy ≤ 0.9 of dense" in outcome.stdout and "measured as a whole" in outcome.stdout
    assert {p.name for p in (tmp_path / "a").iterdir()} == {"recipe.toml", "search.json", "sensitivity.json", "front.svg", "front.png"}
    found = json.loads((tmp_path / "a" / "search.json").read_text())
    assert found["shiftaddvit"]["kind"] == "search" and not was_changed(found)
    assert found["met"] and found["split"] == "train" and found["found"]["totals"]["energy"] <= 0.9 * found["dense"]["totals"]["energy"]
    run("convert", dense, "--recipe", tmp_path / "a" / "recipe.toml", "-o", tmp_path / "b.safetensors")
    changed = {o["modules"] for o in load(tmp_path / "b.safetensors").shiftaddvit_recipe.to_dict()["overrides"]}
    assert changed == set(found["found"]["choice"]) != set()
    again = ("search", dense, "--sensitivity", tmp_path / "a" / "sensitivity.json", *few, "--no-figure")
    outcome = run(*again, "--budget", "energy=0.01", "-o", tmp_path / "c", "--json")
    assert json.loads(outcome.stdout)["met"] is False
    refused(*again, "-o", tmp_path / "a", says="recipe.toml exists already")
    other = tmp_path / "other.safetensors"
    torch.manual_seed(1)
    save(create_model(VIT, ARGS | {"num_classes": 2}), other)
    refused("search", other, *again[2:], "-o", tmp_path / "d", says="measured with other weights")
    assert not (tmp_path / "d").exists()


def test_recipes_are_listed_and_printed_as_toml_that_reads_back(tmp_path):
    listed = run("recipes").stdout
    assert all(name in listed for name in shiftaddvit.recipes)
    file = tmp_path / "mine.toml"
    file.write_text(run("recipes", "ours-quant-moe").stdout)
    assert shiftaddvit.Recipe.from_toml(file) == shiftaddvit.recipes["ours-quant-moe"]


def test_models_are_listed():
    assert "pvt_v2_b0" in run("models").stdout
    assert run("models", "pvt_v2_b?").stdout.split() == [f"pvt_v2_b{i}" for i in range(6)]


# ---- what bad input gets


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


def test_mistyped_commands_and_options_end_with_2():
    assert "finetune" in run("finetun", code=2).stderr
    assert "--recip" in run("convert", VIT, "--recip", "msa", code=2).stderr


def test_nan_loss_ends_with_2_and_its_message(tmp_path, dense, data, monkeypatch):
    _finetune_raises(monkeypatch, NotFinite("the loss is nan at step 3 of epoch 0, stage 1: first at blocks.0; the last good checkpoint is kept"))
    refused("finetune", dense, data, "--recipe", "mlp-shift", "-o", tmp_path / "run", *SHORT, says="step 3")


def test_weights_that_are_not_numbers_stop_the_run(tmp_path, dense, data):
    model = load(dense)
    with torch.no_grad():
        model.blocks[1].mlp.fc1.weight[0, 0] = float("nan")
    save(model, tmp_path / "nan.safetensors")
    line = refused("finetune", tmp_path / "nan.safetensors", data, "--recipe", "dense", "-o", tmp_path / "run", *SHORT, says="is nan at step 0")
    assert "last good checkpoint is kept" in line and not (tmp_path / "run" / "model.safetensors").exists()


def test_ctrl_c_ends_with_130_and_the_command_that_resumes(tmp_path, dense, data, monkeypatch):
    _finetune_raises(monkeypatch, Interrupted())
    arguments = ["finetune", dense, data, "--recipe", "mlp-shift", "-o", tmp_path / "run", *SHORT, "--overwrite"]
    outcome = run(*arguments, code=130)
    kept = " ".join(str(argument) for argument in arguments[:-1])
    assert f"to resume: shiftaddvit {kept} --resume\n" in outcome.stderr


def test_resume_command_of_several_processes_starts_several(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert resume_command(["finetune", "a b", "--resume"]) == "torchrun --nproc-per-node 2 -m shiftaddvit finetune 'a b' --resume"


def test_full_disk_is_told_and_keeps_the_old_file(tmp_path, dense, monkeypatch):
    output = tmp_path / "a.safetensors"
    output.write_bytes(b"mine")

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(output))

    monkeypatch.setattr(shiftaddvit.serialization, "save_file", full)
    refused("convert", dense, "--recipe", "mlp-shift", "-o", output, "--overwrite", says="out of disk")
    assert output.read_bytes() == b"mine" and list(tmp_path.iterdir()) == [output]


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="no device that is always full")
def test_torchs_own_full_disk_error_is_told_and_other_errors_stay():
    with pytest.raises(UserError, match="out of disk at run"), told_when_disk_is_full(Path("run")):
        torch.save({"a": torch.zeros(100_000)}, "/dev/full")
    with pytest.raises(RuntimeError, match="a bug"), told_when_disk_is_full(Path("run")):
        raise RuntimeError("a bug")


@pytest.mark.parametrize(("size", "tried"), [(64, 32), (6, 2), (2, 1)])
def test_out_of_gpu_memory_names_the_batch_size_to_try(size, tried):
    with pytest.raises(UserError, match=rf"try --batch-size {tried}$"), told_when_memory_ends(size):
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_bugs_keep_their_traceback(tmp_path, dense, data, monkeypatch):
    _finetune_raises(monkeypatch, IndexError("a bug"))
    with pytest.raises(IndexError, match="a bug"):
        run("finetune", dense, data, "--recipe", "mlp-shift", "-o", tmp_path / "run", *SHORT)


def _finetune_raises(monkeypatch, error: BaseException) -> None:
    def broken(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(shiftaddvit.train, "finetune", broken)
