"""What the nvs commands refuse, replace and say before they work."""

import json

import nvs_synthetic
import pytest
import torch
from cli_runs import refused, run
from nvs_models import tiny

from shiftaddvit.errors import UserError
from shiftaddvit.nvs.batch import Batch, TrainingScene, draw_batch
from shiftaddvit.nvs.choose import check_recipe
from shiftaddvit.nvs.gnt import GNT, GNTConfig
from shiftaddvit.nvs.pace import Pace
from shiftaddvit.nvs.pictures import write_png
from shiftaddvit.nvs.prepare import prepare
from shiftaddvit.nvs.rows import ROWS
from shiftaddvit.nvs.scene import normalise
from shiftaddvit.nvs.state import save_model
from shiftaddvit.nvs.step import add_gradients
from shiftaddvit.reparam import recipes, reparameterize


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = nvs_synthetic.write_scene(nvs_synthetic.make_scene(views=6, width=36, height=32), tmp_path_factory.mktemp("scene"))
    save_model(tiny(), place / "model.safetensors")
    return place


def test_render_asks_before_it_replaces_and_leaves_no_stale_frame(folder, tmp_path):
    command = ("nvs", "render", folder, folder / "model.safetensors", "-o", tmp_path / "out", "--device", "cpu", "--samples", 4)
    run(*command, "--frames", 3)
    (tmp_path / "out" / "mine.png").write_bytes(b"mine")
    before = (tmp_path / "out" / "000.png").stat().st_mtime_ns
    refused(*command, "--frames", 2, says="already holds pictures")
    assert (tmp_path / "out" / "000.png").stat().st_mtime_ns == before and (tmp_path / "out" / "002.png").exists()
    run(*command, "--frames", 2, "--overwrite")
    names = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert names == {"000.png", "001.png", "depth/000.png", "depth/001.png", "depth/000.npy", "depth/001.npy", "video.mp4", "depth.mp4", "mine.png"}


def test_train_refuses_a_row_of_the_2d_table(folder, tmp_path):
    said = refused("nvs", "train", folder, "-o", tmp_path / "out", "--recipe", "ours-quant-moe", says="none of the 3D rows")
    assert all(row in said for row in ROWS) and not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="did you mean 'gnt-shift'"):
        check_recipe("gnt-shft")
    for allowed in (None, "mine.toml", *ROWS):
        check_recipe(allowed)
    reparameterize(GNT(GNTConfig(width=16, depth=1)), recipes["ours-quant-moe"])  # Python takes any


def test_prepare_says_one_line_and_the_users_folder(tmp_path, capfd):
    pytest.importorskip("pycolmap")
    for number in range(3):
        image = torch.randint(0, 255, (60, 80, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(number))
        write_png(tmp_path / "photos" / f"{number}.png", image)
    with pytest.raises(UserError) as found:
        prepare(tmp_path / "photos", tmp_path / "out", threads=1)
    assert f"none of the 3 photos in {tmp_path / 'photos'} could be placed" in str(found.value)
    assert capfd.readouterr().err == ""


def test_a_slow_step_says_how_long_it_takes_and_the_limit_leaves_a_model(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("shiftaddvit.nvs.train.first_chunk", lambda *_: 8)
    monkeypatch.setattr("shiftaddvit.nvs.pace.PATIENCE", 0.0)
    ended = run(
        "nvs", "train", folder, "-o", tmp_path / "run", "--minutes", 0.0001, "--rays", 64, "--samples", 4, "--sources", 3,
        "--model-width", 16, "--depth", 1, "--device", "cpu",
    )  # fmt: skip
    lines = ended.stderr.splitlines()
    assert lines[0] == "train: steps of 64 rays with 4 points each on cpu"
    told = [line for line in lines if "a step takes about" in line]
    assert len(told) == 1 and "longer than the 0 s asked for" in told[0]
    facts = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])
    assert facts["steps"] == 1 and facts["held_out_psnr"] is not None
    assert ended.stdout.startswith("1 steps") and (tmp_path / "run" / "model.safetensors").is_file()


def test_the_length_of_a_step_is_foretold_from_its_chunks(monkeypatch):
    now, said = [0.0], []
    monkeypatch.setattr("shiftaddvit.nvs.pace.time.monotonic", lambda: now[0])
    pace = Pace(100, 0.2, said.append)
    pace.start(0.0)
    cuts = []
    for done, at in ((2, 5.0), (4, 6.0), (6, 7.0), (12, 10.0), (14, 11.0), (16, 12.0)):  # 4 s for what comes once, then half a second a ray
        now[0] = at
        cuts.append(pace.seen(done))
    assert len(said) == 1 and "about 54 s here, longer than the 12 s asked for" in said[0]
    assert cuts == [False] * 5 + [True] and pace.cut == 16
    quick = Pace(100, None, said.append)
    quick.start(0.0)
    for done in (50, 99, 100):
        now[0] += 1
        assert not quick.seen(done)
    assert len(said) == 1 and quick.cut is None


def test_a_step_that_ends_early_has_the_gradient_of_the_rays_done():
    model = tiny().train(False)
    scene = TrainingScene.of(normalise(nvs_synthetic.make_scene(views=6, width=36, height=32)), "cpu")
    batch = draw_batch([scene], 0, 0, 32, 3, 0)
    cut = add_gradients(model, batch, "fp32", None, 8, lambda done: done >= 16)
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad(set_to_none=True)
    whole = add_gradients(model, Batch(batch.rays.chunk(0, 16), batch.target[:16], batch.sources), "fp32", None, 8)
    assert torch.allclose(cut, whole)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert torch.allclose(found[name], parameter.grad, rtol=1e-3, atol=1e-6), name
