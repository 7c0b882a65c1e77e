"""The embedded scene agrees with its own poses and depth, and the quickstart runs on it."""

import shutil

import pytest
import torch
from PIL import Image

from shiftaddvit.nvs import quickstart as module
from shiftaddvit.nvs.cameras import pixel_grid, pixel_rays, project
from shiftaddvit.nvs.gnt import GNTConfig
from shiftaddvit.nvs.inspect import inspect_scene
from shiftaddvit.nvs.load import load_scene
from shiftaddvit.nvs.pictures import write_png
from shiftaddvit.nvs.prepare import prepare
from shiftaddvit.nvs.quickstart import embedded_depth, embedded_scene, quickstart


def test_embedded_scene_is_small_and_forward_facing():
    scene = embedded_scene()
    assert (len(scene), scene.width, scene.height, scene.test) == (24, 126, 94, (0, 8, 16))
    assert inspect_scene(scene).forward_facing
    folder = module._folder()
    assert sum(path.stat().st_size for path in (folder / "images").iterdir()) < 1_000_000
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 1_000_000


def test_embedded_depth_and_poses_are_exact():
    """Lift view 7 by its depth, look at it from view 9: the same depth is there and the same colour, but for what is hidden."""
    scene = embedded_scene()
    depth, other = embedded_depth(scene, 7), embedded_depth(scene, 9)
    pixels = pixel_grid(94, 126).double()
    origin, direction = pixel_rays(pixels, scene.intrinsics[7], scene.poses[7])
    points = origin + depth.reshape(-1, 1) * scene.unit * direction
    found, found_depth = project(points, scene.intrinsics[9:10], scene.poses[9:10])
    x, y = found[0].round().long().unbind(-1)
    inside = (x >= 0) & (x < 126) & (y >= 0) & (y < 94)
    assert inside.float().mean() > 0.7
    x, y = x[inside], y[inside]
    relative = (found_depth[0][inside] / scene.unit - other[y, x]).abs() / other[y, x]
    assert relative.median() < 0.005, "depth"
    agree = relative < 0.01
    here = scene.images[7].reshape(-1, 3)[inside][agree].float() / 255
    difference = (here - scene.images[9][y, x][agree].float() / 255).abs().mean(dim=-1)
    assert difference.median() < 0.05, "colour"
    low, high = depth.min() * scene.unit, depth.max() * scene.unit
    assert scene.bounds[7, 0].item() == float(low) or abs(scene.bounds[7, 0] / low - 1) < 1e-3
    assert abs(scene.bounds[7, 1] / high - 1) < 1e-3


def test_quickstart_writes_a_strip(tmp_path, monkeypatch):
    """A few steps of a tiny model: the path, not the quality (that takes minutes)."""
    tiny = GNTConfig(width=8, depth=1, samples=4, sources=2, feature_channels=4, feature_base=4, heads=2, dropout=0.0)
    monkeypatch.setattr(module, "SMALL", tiny)
    monkeypatch.setattr(module, "embedded_scene", lambda: embedded_scene(48))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    said = []
    result = quickstart(tmp_path / "out", "gnt-add-shift-moe", 0.01, 0.01, say=said.append)
    assert list(result.scores) == ["nearest", "gnt", "gnt-add-shift-moe"]
    assert Image.open(result.strip).size == (4 * 48, 2 * 36)
    assert any("recipe gnt-add-shift-moe" in line for line in said)
    assert torch.isfinite(torch.tensor([score.psnr for score in result.scores.values()])).all()


def test_prepare_places_photos_and_names_the_stray_one(tmp_path):
    """Structure from motion on eight of the pictures finds their true positions, up to a similarity."""
    pytest.importorskip("pycolmap")
    chosen = [0, 1, 2, 3, 6, 7, 8, 9]
    (tmp_path / "photos").mkdir()
    for view in chosen:
        shutil.copy(module._folder() / "images" / f"view{view:02d}.jpg", tmp_path / "photos")
    write_png(tmp_path / "photos" / "stray.png", torch.rand(189, 252, 3, generator=torch.Generator().manual_seed(0)))
    done = prepare(tmp_path / "photos", tmp_path / "scene", threads=1)
    assert done.dropped == ("stray.png",) and len(done.scene) == 8 and done.pixel_error < 1.5
    found = load_scene(tmp_path / "scene").poses[:, :3, 3]
    truth = embedded_scene().poses[chosen, :3, 3]
    found, truth = found - found.mean(dim=0), truth - truth.mean(dim=0)
    left, sizes, right = torch.linalg.svd(found.T @ truth)
    aligned = sizes.sum() / found.square().sum() * found @ (right.T @ left.T).T
    assert (aligned - truth).norm(dim=-1).mean() < 0.15 * truth.norm(dim=-1).mean()
