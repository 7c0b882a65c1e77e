"""The quickstart: what ships with the package is what it says, and a shortened run goes the whole way."""

import hashlib
import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import typer
from rich.console import Console
from typer.testing import CliRunner

from shiftaddvit.errors import UserError
from shiftaddvit.evaluation import evaluate
from shiftaddvit.quickstart import assets, multiplications, pretrain, rows
from shiftaddvit.quickstart.command import RESULT, quickstart, run
from shiftaddvit.reparam import reparameterize
from shiftaddvit.report.ablation import comparisons
from shiftaddvit.report.reading import read_results
from shiftaddvit.serialization import load, read_metadata

SHORT = rows.Budget(train_images=40, test_images=100, batch=20)
SHA256 = {
    "fashion_mnist.npz": "908f9590e02c66a2f8ab382db7e3c34240be6922f5b72ccdf83c50b98dd1d3f4",
    "dense.safetensors": "740979a6e459a1389af02068175b134b57922be583ab4943073d10cb45039cfb",
}


@pytest.fixture(scope="module")
def images():
    return assets.load_images()


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart") / "run"
    text = io.StringIO()
    found = run(folder, SHORT, Console(file=text, width=100), as_json=str(folder / "more.json"), show=False)
    return folder, found, text.getvalue()


@pytest.mark.parametrize("name", SHA256)
def test_embedded_file_is_the_one_described(name):
    content = assets.asset(name).read_bytes()
    assert len(content) < 4e6
    assert hashlib.sha256(content).hexdigest() == SHA256[name]
    assert SHA256[name] in assets.asset("README.md").read_text()


def test_licence_and_origin_of_the_images_ship_with_them():
    assert "Copyright © 2017 Zalando SE" in assets.asset("LICENSE-fashion-mnist.txt").read_text()
    assert "dataset-fashion-mnist" in assets.asset("README.md").read_text()


def test_no_test_image_was_trained_on(images):
    def distinct(part):
        return {image.tobytes() for image in part}

    assert not distinct(images.train_images) & distinct(images.test_images)
    assert len(distinct(images.train_images)) == 6000 and len(distinct(images.test_images)) == 2000


def test_every_class_has_as_many_images(images):
    assert np.bincount(images.train_labels).tolist() == [600] * 10
    assert np.bincount(images.test_labels).tolist() == [200] * 10


def test_first_images_of_each_class_keep_their_order():
    labels = np.tile(np.arange(10), 3)[::-1]
    assert pretrain.first_of_each_class(labels, 2).tolist() == list(range(20))


def test_damaged_idx_file_is_refused(tmp_path):
    import gzip

    (tmp_path / "half.gz").write_bytes(gzip.compress(bytes([0, 0, 8, 1, 0, 0, 0, 5, 1, 2])))
    with pytest.raises(UserError, match="half.gz is not a whole IDX file"):
        pretrain.read_idx(tmp_path / "half.gz")


def test_dense_model_reaches_its_stated_accuracy(images):
    stated = float(read_metadata(assets.asset("dense.safetensors"))["top1_embedded"])
    reached = evaluate(assets.load_dense(), assets.test_loader(images.test_images, images.test_labels), progress=False)
    assert stated > 85
    assert abs(reached.top1 - stated) <= 0.1  # two images: other processors round otherwise


def test_dense_multiplications_equal_a_count_by_hooks():
    model = assets.load_dense()
    counted = []

    def count(module, _inputs, output):
        inner = module.weight[0].numel()  # numbers that go into one output
        counted.append(output.numel() * inner)

    handles = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))]
    with torch.no_grad():
        model(torch.zeros(1, 3, 32, 32))
    for handle in handles:
        handle.remove()
    # Scores and their product with v: tokens × keys × width, twice; stages have 1, 2 and 1 blocks, the first one reduces 64 keys to 16.
    attention = 2 * (64 * 16 * 32 + 2 * 16 * 16 * 64 + 4 * 4 * 128)
    assert multiplications.multiplications(model, 32, {}) == sum(counted) + attention


def test_shifting_every_linear_removes_exactly_their_multiplications():
    def of(recipe):
        return multiplications.multiplications(reparameterize(assets.load_dense(), recipe), 32, {})

    linears = sum(tokens * blocks * 12 * width**2 for tokens, blocks, width in ((64, 1, 32), (16, 2, 64), (4, 1, 128)))
    assert of("ours-quant-add") - of("ours-quant-shift") == linears  # 12 width²: qkv 3, proj 1, and 8 in an MLP of ratio 4


def test_short_run_prints_every_row(short_run):
    _, found, text = short_run
    for name in rows.ROWS:
        assert name in text
    assert "too easy" in text and "identical logits" in text and "shiftaddvit convert" in text
    assert [row.recipe for row in found] == [None, *rows.ROWS.values()]


def test_short_run_measures_what_the_rows_are(short_run):
    _, found, _ = short_run
    dense, msa, linear, add, shift, moe = found
    assert dense.removed == 0 and msa.removed < 0
    assert linear.removed < add.removed < moe.removed < shift.removed < 1
    assert shift.shift_share == 1 and 0 < moe.shift_share < 1 and add.shift_share is None
    assert shift.bytes < 0.3 * dense.bytes and moe.bytes < 0.65 * dense.bytes
    assert all(row.largest_difference == 0 for row in found[1:])


def test_saved_rows_evaluate_as_the_table_says(short_run, images):
    folder, found, _ = short_run
    loader = assets.test_loader(images.test_images[:100], images.test_labels[:100])
    assert evaluate(load(folder / "ours-quant-moe.safetensors"), loader, progress=False).top1 == found[-1].evaluation.top1


def test_the_report_shows_the_whole_run(short_run, tmp_path):
    folder, found, text = short_run
    assert f"shiftaddvit report {folder}" in text.replace("\n", "")
    read = read_results([folder])
    assert not read.skipped
    assert [run.accuracy.top1 for run in read.runs] == [row.evaluation.top1 for row in found]
    assert {energy.recipe for energy in read.energies} == {"dense", *rows.ROWS.values()} and {curve.label for curve in read.curves} == set(rows.ROWS.values())
    maps = read.dispatches[0]
    assert len(maps.pictures) == 8 and maps.mixtures[0].grid == (8, 8) and maps.images == 100
    lines = [line for line in comparisons(read)[0].lines if line.runs]
    assert len(lines) == 6 and all(line.energy for line in lines)


def test_every_row_has_a_card(short_run):
    folder, found, _ = short_run
    for row in found[1:]:
        card = row.file.with_suffix(".md").read_text()
        assert f"**{row.evaluation.top1:.2f} %**" in card and "Modelled, not measured" in card


def test_numbers_are_written_with_their_conditions(short_run):
    folder, found, _ = short_run
    written = json.loads((folder / RESULT).read_text())
    assert written == json.loads((folder / "more.json").read_text())
    assert written["conditions"]["seed"] == 0 and written["budget"]["train_images"] == 40
    assert [row["evaluation"]["top1"] for row in written["rows"]] == [row.evaluation.top1 for row in found]


def test_rows_are_the_same_for_the_same_seed(tmp_path, short_run, images):
    folder, found, _ = short_run
    setting = rows.Setting(images, SHORT, tmp_path, torch.device("cpu"), 0, show=False)
    again = rows.converted_row("+ MoE (both)", found[0], setting)
    expected, actual = (load(where / again.file.name).state_dict() for where in (folder, tmp_path))
    for name, tensor in expected.items():
        assert torch.equal(tensor, actual[name]), name


def test_folder_with_another_run_is_refused(short_run):
    folder, _, _ = short_run
    app = typer.Typer()
    app.command()(quickstart)
    before = sorted(path.stat().st_mtime_ns for path in folder.iterdir())
    failed = CliRunner().invoke(app, ["--output", str(folder)])
    assert isinstance(failed.exception, UserError) and "--overwrite" in str(failed.exception)
    assert sorted(path.stat().st_mtime_ns for path in folder.iterdir()) == before


def test_unknown_device_is_refused(tmp_path):
    with pytest.raises(UserError, match="--device must be cpu or cuda, got 'tpu'"):
        run(tmp_path / "run", SHORT, Console(file=io.StringIO()), device="tpu")
    assert not (tmp_path / "run").exists()


def test_budget_beyond_the_embedded_images_is_refused():
    with pytest.raises(UserError, match="6000 training"):
        replace(SHORT, train_images=7000)
