"""Rendering, camera paths, metrics, preparing photos, and the command line."""

import json
import math
from dataclasses import replace

import numpy as np
import nvs_synthetic
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from shiftaddvit.cli.nvs import app
from shiftaddvit.errors import UserError
from shiftaddvit.nvs.bench import bench_result, time_row
from shiftaddvit.nvs.choose import choose_model, choose_path, load_any, row_model
from shiftaddvit.nvs.evaluate import SceneScore, ViewScore, evaluate
from shiftaddvit.nvs.floors import Nearest, Sweep
from shiftaddvit.nvs.gnt import GNT, GNTConfig
from shiftaddvit.nvs.inspect import cameras_picture, inspect_scene
from shiftaddvit.nvs.metrics import psnr, ssim
from shiftaddvit.nvs.output import bench_table, score_table, write_frames
from shiftaddvit.nvs.paths import interpolated, read_path, slerp, spiral
from shiftaddvit.nvs.pictures import write_png
from shiftaddvit.nvs.prepare import prepare
from shiftaddvit.nvs.render import make_renderer
from shiftaddvit.nvs.scene import normalise
from shiftaddvit.nvs.state import save_model
from shiftaddvit.nvs.video import color_ramp, depth_picture, error_picture, write_video

TINY = GNTConfig(width=16, depth=2, samples=6, sources=3, feature_channels=4, feature_base=4)


@pytest.fixture(scope="module")
def scene():
    return normalise(nvs_synthetic.make_scene(views=6, width=36, height=32))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A scene folder and a tiny trained model beside it."""
    path = nvs_synthetic.write_scene(nvs_synthetic.make_scene(views=6, width=36, height=32), tmp_path_factory.mktemp("scene"))
    torch.manual_seed(0)
    save_model(GNT(TINY), path / "model.safetensors")
    return path


def test_rendering_does_not_depend_on_the_chunk(scene):
    torch.manual_seed(0)
    model = GNT(TINY)
    camera = scene.camera(0)
    whole, parts = (make_renderer(model, scene, chunk=chunk).render(camera) for chunk in (4096, 37))
    assert torch.allclose(whole.rgb, parts.rgb, atol=1e-5)
    assert torch.allclose(whole.depth, parts.depth, atol=1e-4)


def test_padding_the_last_chunk_changes_nothing(scene):
    torch.manual_seed(0)
    renderer = make_renderer(GNT(TINY), scene, chunk=500)
    plain = renderer.render(scene.camera(0))
    renderer.even = True
    assert torch.allclose(renderer.render(scene.camera(0)).rgb, plain.rgb, atol=1e-5)


def test_rendering_goes_on_with_half_the_chunk_when_memory_runs_out(scene):
    class Greedy(Nearest):
        def forward(self, rays, sources):
            if len(rays.pixel) > 100:
                raise torch.OutOfMemoryError("too many rays")
            return super().forward(rays, sources)

    renderer = make_renderer(Greedy(), scene, chunk=1024)
    expected = make_renderer(Nearest(), scene).render(scene.camera(0))
    assert torch.equal(renderer.render(scene.camera(0)).rgb, expected.rgb)
    assert renderer.chunk.rays == 64


def test_features_are_computed_once_a_source_view(scene):
    calls = []

    class Counted(GNT):
        def encode(self, images):
            calls.append(len(images))
            return super().encode(images)

    renderer = make_renderer(Counted(TINY), scene)
    for index in (0, 1, 0):
        renderer.render(scene.camera(index))
    assert sum(calls) == len(scene.train)


def test_depth_is_in_the_units_of_the_file(scene):
    original = nvs_synthetic.make_scene(views=6, width=36, height=32)
    _, truth = nvs_synthetic.render(original.intrinsics[0], original.poses[0], 32, 36)
    depth = make_renderer(Sweep(sources=5), scene).render(scene.camera(0)).depth
    assert ((depth - truth).abs() / truth).median() < 0.08


def test_too_few_views_for_the_model_are_refused(scene):
    with pytest.raises(UserError, match="5 training views but 10 sources"):
        make_renderer(Sweep(), scene)


# Camera paths


def test_spiral_stays_near_and_looks_at_the_scene(scene):
    cameras = spiral(scene, 12)
    assert len(cameras) == 12
    reach = scene.poses[:, :3, 3].norm(dim=-1).max()
    for camera in cameras:
        assert camera.pose[:3, 3].norm() < 1.5 * reach
        assert camera.pose[2, 2] < -0.9, "looks along −z"
        assert torch.allclose(camera.pose[:3, :3].T @ camera.pose[:3, :3], torch.eye(3, dtype=torch.float64), atol=1e-9)
    assert len({tuple(camera.pose[:3, 3].tolist()) for camera in cameras}) == 12


def test_interpolation_passes_through_the_views(scene):
    cameras = interpolated(scene, 11)  # every second one is a captured view
    for view in range(6):
        assert torch.allclose(cameras[2 * view].pose, scene.poses[view], atol=1e-9)


def test_slerp_goes_half_the_way():
    angle = 0.8
    turn = torch.tensor([[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0], [0, 0, 1]], dtype=torch.float64)
    half = slerp(torch.eye(3, dtype=torch.float64), turn, 0.5)
    assert torch.allclose(half @ half, turn, atol=1e-9)
    with pytest.raises(UserError, match="opposite"):
        slerp(torch.eye(3, dtype=torch.float64), torch.diag(torch.tensor([1.0, -1.0, -1.0], dtype=torch.float64)), 0.5)


@pytest.mark.parametrize("convention", ["opengl", "opencv"])
def test_a_users_path_is_in_the_files_world(scene, tmp_path, convention):
    """The file's own poses, given as a path, are the scene's cameras."""
    original = nvs_synthetic.make_scene(views=6, width=36, height=32)
    flip = torch.diag(torch.tensor([1.0, -1, -1, 1], dtype=torch.float64)) if convention == "opengl" else torch.eye(4, dtype=torch.float64)
    frames = [{"transform_matrix": (pose @ flip).tolist()} for pose in original.poses]
    (tmp_path / "path.json").write_text(json.dumps({"convention": convention, "frames": frames}))
    for camera, pose in zip(read_path(tmp_path / "path.json", scene), scene.poses, strict=True):
        assert torch.allclose(camera.pose, pose, atol=1e-9)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("{}", "'frames' must be a list"),
        ('{"frames": [{}]}', r"frames\[0\] needs a 'transform_matrix'"),
        (json.dumps({"frames": [{"transform_matrix": np.zeros((4, 4)).tolist()}]}), r"frames\[0\]: the pose is singular"),
        (json.dumps({"frames": [{"transform_matrix": np.eye(4).tolist(), "fl_x": -1}]}), "'fl_x' must be a positive number"),
        (json.dumps({"convention": "maya", "frames": [{}]}), "'convention' is 'maya'"),
        (json.dumps({"frames": [{"transform_matrix": np.diag([1, 1, -1, 1]).tolist()}]}), "mirrors the world"),
    ],
)
def test_broken_paths_are_named(scene, tmp_path, text, message):
    (tmp_path / "path.json").write_text(text)
    with pytest.raises(UserError, match=message):
        choose_path(str(tmp_path / "path.json"), scene, 3)


def test_unknown_paths_are_refused(scene):
    with pytest.raises(UserError, match="unknown path 'spyral': did you mean 'spiral'"):
        choose_path("spyral", scene, 3)
    with pytest.raises(UserError, match="holds out no view"):
        choose_path("held-out", replace(scene, test=()), 3)


def test_the_path_suits_the_scene_unless_one_is_asked(scene):
    assert torch.equal(choose_path("auto", scene, 3)[1].pose, spiral(scene, 3)[1].pose)
    turned = scene.poses.clone()
    turned[0, :3, :3] = turned[0, :3, :3] @ torch.tensor([[0.0, 0, 1], [0, 1, 0], [-1, 0, 0]], dtype=turned.dtype)
    around = replace(scene, poses=turned)
    assert torch.equal(choose_path("auto", around, 3)[1].pose, interpolated(around, 3)[1].pose)


# Metrics


def test_psnr_is_what_it_says():
    truth = torch.zeros(4, 4, 3)
    assert psnr(truth + 0.1, truth) == pytest.approx(20.0, abs=1e-5)
    assert psnr(truth, truth) == math.inf


def test_ssim_equals_an_independent_one():
    metrics = pytest.importorskip("skimage.metrics")
    random = np.random.default_rng(0)
    truth = random.random((40, 50, 3)).astype(np.float32)
    other = np.clip(truth + 0.1 * random.standard_normal(truth.shape), 0, 1).astype(np.float32)
    expected = metrics.structural_similarity(
        truth, other, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1.0, channel_axis=2
    )
    assert ssim(torch.from_numpy(other), torch.from_numpy(truth)) == pytest.approx(expected, abs=2e-3)


def test_scores_are_means_over_views_and_lpips_is_null(scene):
    score = evaluate(make_renderer(Nearest(), replace(scene, test=(0, 3))))
    assert score.psnr == pytest.approx(sum(view.psnr for view in score.views) / 2)
    assert score.lpips is None and score.to_dict()["lpips"] is None
    json.dumps(score.to_dict(), allow_nan=False)
    assert "not computed" in score_table(score)
    mixed = SceneScore("s", 1, 1, (ViewScore("a", 1, 1, 0.1, 1), ViewScore("b", 1, 1, None, 1)))
    assert mixed.lpips is None, "a mean over some views would be a lie"


def test_evaluation_without_held_out_views_is_refused(scene):
    with pytest.raises(UserError, match="holds out no view"):
        evaluate(make_renderer(Nearest(), replace(scene, test=())))


def test_lpips_takes_given_weights_only(tmp_path):
    pytest.importorskip("lpips")
    from shiftaddvit.nvs.metrics import Lpips

    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "vgg.pth")
    with pytest.raises(UserError, match="does not hold torchvision's vgg16"):
        Lpips(tmp_path / "vgg.pth")


# Files


def test_frames_are_written_with_depth_and_error(scene, tmp_path):
    renderer = make_renderer(Nearest(), scene)
    truth = [scene.images[0].float() / 255] * 2
    write_frames(renderer, [scene.camera(0)] * 2, tmp_path, 10, truth)
    assert Image.open(tmp_path / "001.png").size == (36, 32)
    assert np.load(tmp_path / "depth" / "000.npy").shape == (32, 36)
    assert Image.open(tmp_path / "error" / "000.png").size == (3 * 36, 32)
    assert (tmp_path / "video.mp4").read_bytes()[4:8] == b"ftyp"


def test_video_has_every_frame(tmp_path):
    imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg")
    write_video(tmp_path / "v.mp4", [torch.full((33, 47, 3), level / 10) for level in range(10)], 10)
    frames, _ = imageio_ffmpeg.count_frames_and_secs(str(tmp_path / "v.mp4"))
    assert frames == 10


def test_ramp_goes_from_dark_to_light():
    colors = color_ramp(torch.linspace(0, 1, 30))
    assert (colors.mean(dim=-1).diff() > 0).all()
    near, far = depth_picture(torch.tensor([[1.0, 5.0]]), 1.0, 5.0)[0]
    assert near.sum() > far.sum()
    same = torch.rand(3, 4, 3)
    assert torch.allclose(error_picture(same, same)[:, 8:], color_ramp(torch.zeros(3, 4)))


# Inspecting and preparing


def test_inspection_tells_facing_from_turning(scene):
    found = inspect_scene(scene)
    assert found.forward_facing and found.overlap > 0.6 and found.spread > 0.05
    assert found.near == pytest.approx(nvs_synthetic.make_scene(views=6, width=36, height=32).bounds[:, 0].min().item())
    still = nvs_synthetic.make_scene(views=6, width=36, height=32, spread=0.005)
    assert "move sideways" in inspect_scene(still).advice
    assert cameras_picture(scene).shape == (480, 960, 3)


def photos(folder, count=3):
    for number in range(count):
        image = np.random.default_rng(number).integers(0, 255, (60, 80, 3), dtype=np.uint8)
        write_png(folder / f"{number}.png", torch.from_numpy(image))


def test_photos_that_do_not_register_are_refused(tmp_path):
    pytest.importorskip("pycolmap")
    photos(tmp_path / "photos")
    with pytest.raises(UserError, match="none of the 3 photos .* could be placed"):
        prepare(tmp_path / "photos", tmp_path / "out", threads=1)
    assert not (tmp_path / "out").exists()


def test_one_photo_and_mixed_sizes_and_a_full_folder_are_refused(tmp_path):
    pytest.importorskip("pycolmap")
    photos(tmp_path / "one", 1)
    with pytest.raises(UserError, match="1 photo .*at least 2"):
        prepare(tmp_path / "one", tmp_path / "out")
    photos(tmp_path / "mixed")
    write_png(tmp_path / "mixed" / "9.png", torch.zeros(80, 60, 3))
    with pytest.raises(UserError, match="9.png: 60×80 pixels, but 0.png has 80×60"):
        prepare(tmp_path / "mixed", tmp_path / "out")
    (tmp_path / "one" / "0.png").write_bytes(b"\x89PNG")
    photos(tmp_path / "broken")
    (tmp_path / "broken" / "1.png").write_bytes((tmp_path / "broken" / "1.png").read_bytes()[:500])
    with pytest.raises(UserError, match="1.png: cannot be read"):
        prepare(tmp_path / "broken", tmp_path / "out")
    with pytest.raises(UserError, match="is not empty"):
        prepare(tmp_path / "mixed", tmp_path / "one")
    (tmp_path / "mixed" / "IMG_1.HEIC").write_bytes(b"")
    with pytest.raises(UserError, match="IMG_1.HEIC: convert them to JPEG"):
        prepare(tmp_path / "mixed", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Naming things


def test_models_are_found_by_name_file_and_row(folder, scene):
    assert isinstance(load_any("sweep"), Sweep)
    model = load_any(folder / "model.safetensors", samples=9)
    assert model.samples == 9
    name, row = row_model("gnt-shift", scene, 8)
    assert name == "gnt-shift" and row.samples == 8
    with pytest.raises(UserError, match="unknown row 'gnt-shft': did you mean 'gnt-shift'"):
        row_model("gnt-shft", scene, None)
    with pytest.raises(UserError, match="no such model"):
        load_any("nowhere.pth")


@pytest.mark.parametrize(("field", "value"), [("width", 64), ("depth", 8)])
def test_a_start_of_another_shape_is_refused(folder, scene, field, value):
    with pytest.raises(UserError, match=f"of {field} {getattr(TINY, field)}, but {field} {value} was asked"):
        choose_model("gnt", folder / "model.safetensors", None, {field: value}, scene, 0)


def test_bench_keeps_measured_modelled_and_published_apart(scene):
    timings = [time_row(name, GNT(TINY), scene, "cpu", repeats=1) for name in ("gnt", "gnt-shift", "mine")]
    result = bench_result(timings, scene, "cpu", "fp32", 1)
    row = result["rows"][1]
    assert row["seconds"] > 0 and row["published_seconds"] == 531.2 and row["published_joules"] is None
    assert 0 < row["joules_paper"] < result["rows"][0]["joules_paper"]
    assert result["rows"][2]["joules"] is None
    assert "| gnt-shift | " in bench_table(result) and "not run" in bench_table(result)
    json.dumps(result, allow_nan=False)


# The command line


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_train_evaluate_and_render_from_the_command_line(folder, tmp_path):
    trained = run(
        "train", folder, "-o", tmp_path / "run", "--steps", 2, "--rays", 8, "--samples", 4, "--sources", 3, "--model-width", 16, "--depth", 1,
        "--device", "cpu",
    )  # fmt: skip
    assert trained.exit_code == 0, trained.output
    model = tmp_path / "run" / "model.safetensors"
    converted = run(
        "train", folder, "-o", tmp_path / "converted", "--from", model, "--recipe", "gnt-add-shift", "--steps", 1, "--rays", 8, "--device", "cpu"
    )  # fmt: skip
    assert converted.exit_code == 0, converted.output
    scored = run("evaluate", folder, tmp_path / "converted" / "model.safetensors", "-o", tmp_path / "score.json", "--device", "cpu")
    assert scored.exit_code == 0, scored.output
    assert json.loads((tmp_path / "score.json").read_text())["lpips"] is None
    rendered = run("render", folder, model, "-o", tmp_path / "frames", "--frames", 2, "--device", "cpu")
    assert rendered.exit_code == 0, rendered.output
    assert {"000.png", "001.png", "depth", "video.mp4"} <= {path.name for path in (tmp_path / "frames").iterdir()}


def test_inspect_from_the_command_line(folder, tmp_path):
    shown = run("inspect", folder, "--picture", tmp_path / "cameras.png", "--json")
    assert shown.exit_code == 0 and json.loads(shown.output)["views"] == 6
    assert Image.open(tmp_path / "cameras.png").size == (960, 480)


def test_a_mistake_exits_with_two_and_one_line():
    from shiftaddvit.cli.main import app as whole

    result = CliRunner().invoke(whole, ["nvs", "inspect", "nowhere"])
    assert result.exit_code == 2
    assert "nowhere: no such folder" in result.output and "Traceback" not in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("inspect", "nowhere"), "no such folder"),
        (("evaluate", "{folder}", "nowhere.pth"), "no such model"),
        (("evaluate", "{folder}", "sweep", "--device", "cpu"), "5 training views but 10 sources"),
        (("train", "{folder}", "-o", "{out}", "--from", "{folder}/model.safetensors", "--depth", "8"), "of depth 2, but depth 8"),
        (("train", "{folder}", "-o", "{out}", "--recipe", "gnt-shft"), "unknown recipe 'gnt-shft'"),
        (("render", "{folder}", "{folder}/model.safetensors", "-o", "{out}", "--path", "zigzag"), "unknown path 'zigzag'"),
        (("inspect", "{folder}", "--near", "5", "--far", "2"), "0 < near < far"),
        (("train", "{folder}", "-o", "{out}", "--model", "nerf", "--depth", "3"), "NeRF has no depth"),
    ],
)
def test_mistakes_are_user_errors_and_write_nothing(folder, tmp_path, arguments, message):
    filled = [argument.format(folder=folder, out=tmp_path / "out") for argument in arguments]
    result = run(*filled)
    assert isinstance(result.exception, UserError), result.output
    assert message in str(result.exception) and "\n" not in str(result.exception)
    assert not (tmp_path / "out").exists()
