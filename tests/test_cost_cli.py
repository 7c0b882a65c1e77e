"""`shiftaddvit energy`: its JSON, its tables and figures, and what it says to bad input."""

import json
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from typer.testing import CliRunner

from shiftaddvit.cli.main import app
from shiftaddvit.cost import compare, energy, sweep
from shiftaddvit.cost.figures import bar_figure
from shiftaddvit.cost.primitives import ratio, sources, unit_costs
from shiftaddvit.cost.units import load_units, table_names
from shiftaddvit.errors import UserError
from shiftaddvit.reparam import reparameterize
from shiftaddvit.reparam.architecture import create_model
from shiftaddvit.serialization import save


def run(*arguments: object, code: int = 0) -> str:
    outcome = CliRunner().invoke(app, ["energy", *map(str, arguments)])
    assert outcome.exit_code == code, (outcome.output, outcome.exception)
    return outcome.output


def as_json(*arguments: object) -> dict:
    return json.loads(run(*arguments, "--json", "-"))


def test_every_documented_option_at_once_gives_the_published_energy():
    found = as_json(
        "pvt_v2_b0", "--recipe", "ours-quant-moe", "--mode", "paper", "--coverage", "full", "--shift-share", 0.5, "--add-index-bug",
        "--no-stage4-matmuls", "--image-size", 224, "--batch", 1, "--units", "45nm",
    )  # fmt: skip
    assert found["total_mj"] == pytest.approx(24.971, abs=6e-4)
    assert found["settings"]["mode"] == "paper" and found["settings"]["shift_share"] == pytest.approx(0.5)
    layer = found["per_layer"][0]
    assert {"name", "primitive", "levels", "operands", "tiling"} <= set(layer)
    assert sum(layer["levels"].values()) == pytest.approx(sum(layer["operands"].values()))
    assert sum(layer["total_pj"] for layer in found["per_layer"]) * 1e-9 == pytest.approx(found["total_mj"])
    assert any("norms, softmax" in entry["reason"] for entry in found["uncosted"])


def test_the_output_for_json_is_one_object_and_nothing_else(tmp_path):
    command = [sys.executable, "-c", "from shiftaddvit.cli.main import main; main()", "energy", "pvt_tiny", "--json", "-"]
    outcome = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(outcome.stdout)["total_mj"] > 0


def test_json_goes_to_a_file_too(tmp_path):
    target = tmp_path / "energy.json"
    assert str(target) in run("resnet18", "--json", target).replace("\n", "")
    assert json.loads(target.read_text())["model"] == "resnet18, dense"


def test_table_shows_kinds_levels_and_settings():
    text = run("pvt_v2_b0", "--recipe", "ours-quant-moe", "--image-size", "64x96")
    for word in ("linear (shift)", "product (add)", "router", "dram", "settings:", "assumed", "64x96", "analytical Eyeriss model"):
        assert word in text, word
    assert "stages.0.blocks.0.mlp.fc1.experts.1" in run("pvt_v2_b0", "--recipe", "ours-quant-moe", "--image-size", 64, "--layers")


def test_comparison_shows_every_baseline_and_both_figures(tmp_path):
    picture = tmp_path / "bars"
    text = run("pvt_v2_b0", "--compare", "ours-quant-moe,ours-quant-shift", "--baseline", "ecoformer", "--mode", "paper", "--figure", picture)
    for word in ("msa", "pvt", "ecoformer", "ours-quant-shift", "saves vs ecoformer", "savings against it flatter"):
        assert word in text, word
    xml.etree.ElementTree.parse(picture.with_suffix(".svg"))
    with Image.open(picture.with_suffix(".png")) as image:
        pixels = np.asarray(image.convert("RGB"))
    assert pixels.shape[0] > 300 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50


def test_comparison_as_json_has_the_saving_against_each_baseline():
    found = as_json("pvt_v2_b0", "--compare", "ours-quant-moe", "--mode", "paper", "--no-stage4-matmuls", "--shift-share", 0.42)
    savings = found["recipes"]["ours-quant-moe"]["saving"]
    assert set(savings) == {"msa", "pvt", "ecoformer"}
    assert savings["msa"] > savings["ecoformer"] > savings["pvt"] > 0


def test_sweep_writes_its_curve(tmp_path):
    found = json.loads(run("pvt_v2_b0", "--recipe", "ours-quant-moe", "--sweep", "shift-share", "--values", "0,0.5,1", "--json", "-"))
    assert found["values"] == [0, 0.5, 1] and found["total_mj"] == sorted(found["total_mj"], reverse=True)
    run("pvt_v2_b0", "--recipe", "ours-quant-shift", "--image-size", 64, "--sweep", "activation-bits", "--figure", tmp_path / "curve.png")
    assert (tmp_path / "curve.svg").exists() and (tmp_path / "curve.png").exists()


@pytest.mark.parametrize("over", ["weight-bits", "shift-bits", "activation-bits"])
def test_fewer_bits_never_cost_more(over):
    totals = [found.total_mj for found in sweep("pvt_v2_b0", "ours-quant-moe", over, image_size=64).energies]
    assert totals == sorted(totals) and totals[0] < totals[-1]


def test_a_saved_model_is_costed_with_the_routing_of_real_images(tmp_path):
    torch.manual_seed(0)
    model = create_model("pvt_v2_b0", {"num_classes": 4, "depths": (1, 1, 1, 1)})
    save(reparameterize(model, "mlp-moe"), tmp_path / "model.safetensors")
    for number in range(3):
        noise = np.random.default_rng(number).integers(0, 255, (80, 80, 3)).astype(np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{number}.png")
    found = as_json(tmp_path / "model.safetensors", "--images", tmp_path, "--image-size", 64)
    assert "measured over 3 images" in found["settings"]["shift_share_source"]
    assert found["sd_mj"] is not None and found["tokens"][0]["sd"] is not None
    run(tmp_path / "model.safetensors", "--recipe", "msa", code=2)


def test_unit_costs_show_where_each_number_comes_from():
    text = run("units")
    assert "31×" in text and "against shift it is 24×" in text
    assert all(cost.energy_source in sources() for cost in unit_costs())
    assert all(cost.area_source in sources() for cost in unit_costs() if cost.area_um2 is not None)
    energy_ratio, area_ratio = ratio(("mult", "int32"), ("add", "int32"))
    assert round(energy_ratio) == 31 and round(area_ratio) == 26
    assert round(ratio(("mult", "int32"), ("shift", "int32"))[0]) == 24


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pvt_v2_b9"], "unknown model 'pvt_v2_b9': did you mean 'pvt_v2_b"),
        (["pvt_v2_b0", "--recipe", "ours"], "unknown recipe 'ours'"),
        (["pvt_v2_b0", "--recipe", "nowhere.toml"], "'nowhere.toml' does not exist"),
        (["nerf", "--recipe", "msa"], "nerf has no recipes"),
        (["pvt_v2_b0", "--recipe", "ours-quant-moe", "--shift-share", "1.5"], "shift share must be from 0 to 1, got 1.5"),
        (["pvt_v2_b0", "--recipe", "ours-quant-moe", "--shift-share", "nan"], "shift share must be from 0 to 1, got nan"),
        (["pvt_v2_b0", "--image-size", "0"], "image size must be from 1 to"),
        (["pvt_v2_b0", "--image-size", "99999"], "image size must be from 1 to"),
        (["pvt_v2_b0", "--image-size", "big"], "--image-size must be a number of pixels"),
        (["pvt_v2_b0", "--image-size", "3"], "cannot run on inputs of shape (1, 3, 3, 3)"),
        (["pvt_v2_b0", "--batch", "0"], "batch must be from 1 to"),
        (["pvt_v2_b0", "--units", "7nm"], "unknown unit table '7nm'"),
        (["pvt_v2_b0", "--units", "none.toml"], "no such file"),
        (["pvt_v2_b0", "--add-index-bug"], "--add-index-bug belongs to --mode paper"),
        (["pvt_v2_b0", "--mode", "paper", "--word-bits", "16"], "must be 32 or 8"),
        (["pvt_v2_b0", "--activation-bits", "0"], "activation bits must be a whole number"),
        (["deit_tiny_patch16_224", "--mode", "paper"], "patch_embed.proj"),
        (["pvt_v2_b0", "--mode", "paper", "--sweep", "weight-bits"], "mode 'paper' has fixed widths"),
        (["pvt_v2_b0", "--sweep", "shift-share", "--values", "a,b"], "--values must be numbers"),
        (["pvt_v2_b0", "--compare", "msa", "--sweep", "shift-share"], "exclude one another"),
        (["pvt_v2_b0", "--compare", "nothing"], "'shiftaddvit recipes' lists them all"),
        (["pvt_v2_b0", "--images", "."], "--images needs weights"),
        (["missing.safetensors"], "missing.safetensors"),
        (["zzz"], "unknown model 'zzz': none of the"),
        (["pvt_v2_b0", "--mode", "paper", "--units", "65nm"], "unit table '65nm' belongs to mode 'eyeriss'"),
        (["pvt_v2_b0", "--mode", "paper", "--weight-bits", "8"], "belong to mode 'eyeriss'"),
        (["pvt_v2_b0", "--word-bits", "8"], "belong to mode 'paper'"),
        (["pvt_v2_b0", "--shift-bits", "0"], "shift_weight bits must be a whole number from 1 to 64, got 0"),
        (["pvt_v2_b0", "--sweep", "weight-bits", "--values", "8.5"], "weight-bits must be whole numbers, got 8.5"),
        (["pvt_v2_b0", "--sweep", "weight-bits", "--values", "nan"], "weight-bits must be whole numbers, got nan"),
        (["pvt_v2_b0", "--image-size", "64", "--sweep", "shift-share"], "no mixtures of experts"),
        (["pvt_v2_b0", "--values", "1"], "--values belongs to --sweep"),
        (["pvt_v2_b0", "--baseline", "pvt"], "--baseline belongs to --compare"),
        (["pvt_v2_b0", "--layers", "--compare", "msa"], "--layers shows one recipe"),
        (["pvt_v2_b0", "--figure", "bars.pdf"], "a figure is written as .svg and .png"),
        (["pvt_v2_b0", "--json", "."], ". is a folder; name a file to write"),
        (["pvt_v2_b0", "--units", "."], "unknown unit table '.'"),
        (["pvt_v2_b0", "--max-images", "0"], "Invalid value for '--max-images'"),
        (["pvt_v2_b0", "--nothing"], "No such option: --nothing"),
        (["--json", "-"], "Missing argument 'model'"),
        (["pvt_v2_b0", "--mode", "other"], "'other' is not one of 'paper', 'eyeriss'"),
        (["pvt_v2_b0", "--batch", "many"], "Invalid value for '--batch'"),
    ],
    ids=lambda value: "-".join(value[:3]) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_that_names_it(arguments, message):
    text = run(*arguments, code=2)
    assert message in " ".join(text.split()), text
    assert text.startswith("error: ") and len(text.strip().splitlines()) == 1


def test_shipped_unit_tables_are_complete():
    assert set(table_names()) == {"45nm", "45nm-float", "65nm", "eyeriss-normalised"}
    for name in table_names():
        units = load_units(name)
        assert units.source and units.step("mult", 16) > units.step("shift", 16)
    assert dict(load_units("eyeriss-normalised").memory)["dram"] == 200
    table = load_units("65nm")
    assert [table.access(level) for level in ("dram", "buffer", "noc", "rf")] == [460, 15, 4, 1]
    assert table.step("mult", 16) + table.step("add", 16) == pytest.approx(2)


def test_a_table_of_ones_own_is_used(tmp_path):
    text = (Path(__file__).parents[1] / "shiftaddvit/cost/units/45nm.toml").read_text()
    path = tmp_path / "mine.toml"
    path.write_text(text.replace("dram = 168.0", "dram = 0.0"))
    found = energy("pvt_v2_b0", units=str(path))
    assert found.settings["units"] == "mine" and found.by_level()["dram"] == 0


def test_a_wrong_table_is_told_every_entry_at_once(tmp_path):
    text = (Path(__file__).parents[1] / "shiftaddvit/cost/units/45nm.toml").read_text()
    path = tmp_path / "wrong.toml"
    path.write_text(text.replace("noc = 1.68", "noc = -1").replace("pes = 256\n", "").replace("shift = {", "slide = {").replace("rf = 0.84", "rf = 'x'"))
    with pytest.raises(UserError) as caught:
        load_units(str(path))
    message = str(caught.value)
    assert "\n" not in message
    for part in ("memory.noc is negative: -1", "accelerator.pes is missing", "arithmetic.shift is missing", "arithmetic.slide is unknown",
                 "memory.rf must be a number, got 'x'"):  # fmt: skip
        assert part in message, part
    path.write_text("this is not TOML")
    with pytest.raises(UserError, match="not valid TOML"):
        load_units(str(path))


def test_a_table_of_free_arithmetic_is_read_or_told(tmp_path):
    text = (Path(__file__).parents[1] / "shiftaddvit/cost/units/45nm.toml").read_text()
    path = tmp_path / "free.toml"
    path.write_text(text.replace("add = { 8 = 0.03, 16 = 0.05, 32 = 0.1 }", "add = { 8 = 0.0, 32 = 0.4 }"))
    table = load_units(str(path))
    assert [table.step("add", bits) for bits in (4, 8, 20, 32)] == pytest.approx([0, 0, 0.2, 0.4])
    path.write_text(text.replace("mult = { 8 = 0.2, 32 = 3.1 }", "mac_16 = 2.0\nmult = { 8 = 0.0 }").replace("8 = 0.03, 16 = 0.05, 32 = 0.1", "8 = 0"))
    with pytest.raises(UserError, match="mac_16 cannot scale"):
        load_units(str(path))
    path.write_text(text.replace("{ 8 = 0.2,", '{ "²" = 0.2,'))
    with pytest.raises(UserError, match="a width must be a whole number of bits"):
        load_units(str(path))


def test_a_pattern_that_leaves_nothing_out_is_listed():
    text = run("pvt_v2_b0", "--image-size", 64, "--exclude", "nothing.*")
    assert "not counted: nothing.* – this exclude matches no module" in text


def test_an_image_that_cannot_be_read_is_named(tmp_path):
    model = create_model("pvt_v2_b0", {"num_classes": 4, "depths": (1, 1, 1, 1)})
    save(reparameterize(model, "mlp-moe"), tmp_path / "model.safetensors")
    (tmp_path / "broken.png").write_bytes(b"no image")
    text = run(tmp_path / "model.safetensors", "--images", tmp_path, code=2)
    assert "broken.png cannot be read as a picture" in text.replace("\n", "")


def test_images_and_a_forced_share_exclude_one_another():
    model = reparameterize(timm.create_model("pvt_v2_b0", depths=(1, 1, 1, 1)), "mlp-moe")
    with pytest.raises(UserError, match="not both"):
        energy(model, torch.zeros(1, 3, 64, 64), shift_share=0.5)
    with pytest.raises(UserError, match="give the model itself"):
        energy("pvt_v2_b0", torch.zeros(1, 3, 64, 64))
    with pytest.raises(UserError, match="convert this one"):
        energy(model, recipe="msa")


def test_figures_need_matplotlib_and_say_so(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"install shiftaddvit\[report\]"):
        bar_figure(compare("pvt_v2_b0", ["msa"]).energies, tmp_path / "bars.png")


def test_view_synthesis_recipes_are_compared_with_the_network_as_it_is():
    found = compare("gnt", ["gnt-add-shift", "gnt-shift"])
    assert found.baseline == "dense" and set(found.energies) == {"dense", "gnt-add-shift", "gnt-shift"}
    assert 0 < found.saving("gnt-shift") and 0 < found.saving("gnt-add-shift")
