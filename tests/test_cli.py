"""The command line, on six images a class and a transformer of two blocks: what each command does."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cli_runs import ARGS, SHORT, SMALL, VIT, refused, run, write_images

import shiftaddvit.serialization
from shiftaddvit.reparam.architecture import create_model
from shiftaddvit.schema import was_changed
from shiftaddvit.serialization import load, read_metadata, save


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
    floats, packed = tmp_path / "floats.safetensors", tmp_path / "packed.safetensors"
    before = run("convert", dense, "--recipe", "deepshift-q", "-o", floats, "--verbose").stdout
    after = run("convert", floats, "--packed", "-o", packed).stdout
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(load(packed)(images), load(floats)(images))
    assert packed.stat().st_size < floats.stat().st_size
    assert ", not packed (can be trained on), " in before and ", packed (no more training), " in after
    assert "mlp.fc1, as the float weight that is rounded to powers of two" in before and "latent" not in before + after


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


def test_resuming_a_finished_run_changes_nothing(trained, data, dense):
    folder, said = trained
    before = contents(folder)
    refused("finetune", dense, data, "--recipe", "ours-quant-moe", "-o", folder, *SHORT, says="--resume")
    outcome = run("finetune", dense, data, "--recipe", "ours-quant-moe", "-o", folder, *SHORT, "--resume")
    assert "nothing was changed" in outcome.stdout and contents(folder) == before
    top1 = next(line for line in said.splitlines() if line.startswith("top-1"))
    assert top1 in outcome.stdout.splitlines()


def test_a_finished_run_that_was_killed_before_its_last_file_is_completed(data, dense, tmp_path):
    start = ("finetune", dense, data, "--recipe", "mlp-shift", "-o", tmp_path / "run", *SHORT)
    run(*start)
    before = contents(tmp_path / "run")
    result = json.loads(before["result.json"])
    del result["data"]
    (tmp_path / "run" / "result.json").write_text(json.dumps(result))
    run(*start, "--resume")
    assert json.loads((tmp_path / "run" / "result.json").read_text())["data"] == str(data)
    assert read_metadata(tmp_path / "run" / "model.safetensors")["shiftaddvit.images"]


def test_other_data_are_not_resumed_on(trained, data, dense, tmp_path):
    folder, _ = trained
    before = contents(folder)
    start = ("finetune", dense, "--recipe", "ours-quant-moe", "-o", folder, *SHORT, "--resume")
    other = write_images(tmp_path / "renamed", ("cat", "dog"))
    line = refused(*start, other, says="another set of images (training images › classes › 0 was 'dark', is 'cat'")
    assert "--overwrite" in line
    moved = shutil.copytree(data, tmp_path / "moved")
    run(*start, moved)
    (moved / "val" / "dark" / "0.png").unlink()
    refused(*start, moved, says="validation images › number was 12, is 11")
    shutil.copy(moved / "val" / "dark" / "1.png", moved / "val" / "dark" / "new.png")
    refused(*start, moved, says="validation images › digest of labels and names")
    refused(*start, data, "--seed", 1, says="another config (seed was 0, is 1)")
    assert contents(folder) == before


def test_resume_needs_a_run(data, dense, tmp_path):
    start = ("finetune", dense, data, "--recipe", "mlp-shift", "-o", tmp_path / "run", *SHORT)
    refused(*start, "--resume", says="holds no run to resume: start one without --resume")
    assert not (tmp_path / "run").exists()
    run(*start)
    (tmp_path / "run" / "checkpoint.pt").unlink()
    assert "no checkpoint yet" in run(*start, "--resume").stdout


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("command", [("finetune", "--recipe", "msa"), ("pretrain",)])
def test_steps_are_recorded_unless_told_otherwise(command, dense, data, tmp_path, monkeypatch):
    recorded = []
    monkeypatch.setattr("shiftaddvit.cli.training.train", lambda job, config: recorded.append(config.cuda_graph))
    for flag in ((), ("--no-cuda-graph",), ("--cuda-graph",)):
        run(command[0], dense, data, *command[1:], "-o", tmp_path / "run", *flag)
    assert recorded == [True, False, True]


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
    outcome = run(*again, "--budget", "energy=0.01", "-o", tmp_path / "c", "--json", code=3)
    assert json.loads(outcome.stdout)["met"] is False
    outcome = run(*again, "--budget", "energy=0.01", "-o", tmp_path / "c", "--overwrite", code=3)
    assert "next:" not in outcome.stdout and "nearest" in outcome.stdout and "cannot be met" in outcome.stderr
    assert (tmp_path / "c" / "recipe.toml").is_file()
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
