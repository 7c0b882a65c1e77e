"""Scenes, cameras and the three file layouts."""

import json
from dataclasses import replace

import numpy as np
import nvs_synthetic
import pytest
import torch

from shiftaddvit.errors import UserError
from shiftaddvit.nvs import cameras
from shiftaddvit.nvs.llff import read_llff, write_llff
from shiftaddvit.nvs.load import load_scene
from shiftaddvit.nvs.pictures import read_pictures, undistort, write_png
from shiftaddvit.nvs.scene import (
    check_sources,
    every_eighth,
    normalise,
    scale_intrinsics,
    take,
)
from shiftaddvit.nvs.transforms_json import read_transforms, write_transforms


@pytest.fixture(scope="module")
def scene():
    return nvs_synthetic.make_scene()


@pytest.fixture
def folder(scene, tmp_path):
    """The scene's pictures in images/, no poses."""
    for name, image in zip(scene.names, scene.images, strict=True):
        write_png(tmp_path / "images" / name, image)
    return tmp_path


def same_geometry(found, scene, tolerance=1e-9):
    for field in ("intrinsics", "poses", "bounds"):
        error = (getattr(found, field) - getattr(scene, field)).abs().max().item()
        assert error < tolerance, f"{field} differ by {error}"
    assert torch.equal(found.images, scene.images)


def test_llff_round_trip(scene, folder):
    write_llff(folder, scene)
    found = read_llff(folder)
    same_geometry(found, scene)
    assert found.names == scene.names and found.test == (0,)


def test_transforms_round_trip_keeps_the_split(scene, folder):
    moved = replace(scene, test=(1, 4))
    write_transforms(folder, moved)
    found = read_transforms(folder)
    same_geometry(found, moved)
    assert found.test == (1, 4) and found.dropped == ()


def test_colmap_round_trip(scene, folder):
    pytest.importorskip("pycolmap")
    from shiftaddvit.nvs.colmap import read_colmap, write_colmap

    write_colmap(folder, scene)
    same_geometry(read_colmap(folder), scene)


def test_load_scene_finds_the_layout(scene, folder):
    write_llff(folder, scene)
    llff = load_scene(folder)
    (folder / "poses_bounds.npy").unlink()
    write_transforms(folder, scene)
    same_geometry(load_scene(folder), llff, 1e-6)


def test_projection_inverts_rays(scene):
    pixels = cameras.pixel_grid(scene.height, scene.width).double()
    origin, direction = cameras.pixel_rays(pixels, scene.intrinsics[2], scene.poses[2])
    found, depth = cameras.project(origin + 3.0 * direction, scene.intrinsics[2:3], scene.poses[2:3])
    assert torch.allclose(found[0], pixels, atol=1e-9)
    assert torch.allclose(depth[0], torch.full_like(depth[0], 3.0), atol=1e-12), "depth is along the optical axis"


def test_the_same_point_has_the_same_colour_in_two_views(scene):
    """Poses and pictures agree: a wall pixel of view 1, lifted to its depth and projected into view 3, finds its colour."""
    color, depth = nvs_synthetic.render(scene.intrinsics[1], scene.poses[1], scene.height, scene.width)
    x, y = 3, 4
    origin, direction = cameras.pixel_rays(torch.tensor([[x, y]]).double(), scene.intrinsics[1], scene.poses[1])
    point = origin + depth[y, x] * direction
    pixel, _ = cameras.project(point, scene.intrinsics[3:4], scene.poses[3:4])
    u, v = pixel[0, 0].round().long().tolist()
    assert (scene.images[3, v, u].double() / 255 - color[y, x]).abs().max() < 0.1


def test_normalise_centres_and_scales(scene):
    found = normalise(scene)
    mean = cameras.average_pose(found.poses)
    expected = torch.diag(torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64))
    assert torch.allclose(mean, expected, atol=1e-9), "mean camera: x right, y up, looking along −z"
    assert found.depth_range[0] == pytest.approx(0.9 / 0.75)
    point = torch.tensor([0.3, -0.2, 3.0, 1.0], dtype=torch.float64)
    moved = found.world @ point
    before, depth = cameras.project(point[:3], scene.intrinsics, scene.poses)
    after, moved_depth = cameras.project(moved[:3], found.intrinsics, found.poses)
    assert torch.allclose(before, after, atol=1e-6), "normalising moves no pixel"
    assert torch.allclose(depth * found.unit, moved_depth)


def test_resizing_keeps_rays():
    matrix = torch.tensor([[50.0, 0, 15.5], [0, 50.0, 11.5], [0, 0, 1]])
    half = scale_intrinsics(matrix, 0.5, 0.5)
    pose = torch.eye(4)
    # The corner between four pixels of the large picture is the centre of one pixel of the small one.
    _, large = cameras.pixel_rays(torch.tensor([[10.5, 6.5]]), matrix, pose)
    _, small = cameras.pixel_rays(torch.tensor([[5.0, 3.0]]), half, pose)
    assert torch.allclose(large, small)


def test_width_shrinks_pictures_and_intrinsics(scene, folder):
    write_llff(folder, scene)
    found = load_scene(folder, width=16)
    assert found.images.shape[1:3] == (12, 16)
    assert found.intrinsics[0, 0, 0] == pytest.approx(scene.intrinsics[0, 0, 0].item() / 2)


def test_llff_takes_the_smallest_folder_that_is_wide_enough(scene, folder):
    write_llff(folder, scene)
    for name, image in zip(scene.names, scene.images, strict=True):
        write_png(folder / "images_2" / name, image[::2, ::2])
    found = load_scene(folder, width=16)
    assert torch.equal(found.images, scene.images[:, ::2, ::2])


def test_undistort_undoes_the_lens(scene):
    """A picture of straight lines bent by k1 comes back straight."""
    height, width = 40, 60
    matrix = torch.tensor([[50.0, 0, 29.5], [0, 50.0, 19.5], [0, 0, 1]], dtype=torch.float64)
    y, x = torch.meshgrid(torch.arange(height).double(), torch.arange(width).double(), indexing="ij")
    u, v = (x - 29.5) / 50, (y - 19.5) / 50
    ideal_u, ideal_v = u.clone(), v.clone()
    for _ in range(50):  # invert x_d = x (1 + k1 r²)
        factor = 1 + 0.2 * (ideal_u**2 + ideal_v**2)
        ideal_u, ideal_v = u / factor, v / factor
    bent = ((0.5 + 0.4 * torch.sin(8 * ideal_u)) * 255).round().to(torch.uint8)[None, :, :, None].repeat(1, 1, 1, 3)
    straight = ((0.5 + 0.4 * torch.sin(8 * u)) * 255).round()
    found = undistort(bent, matrix, (0.2, 0.0, 0.0, 0.0))[0, :, :, 0].double()
    inner = (slice(4, -4), slice(6, -6))
    assert (found - straight)[inner].abs().max() < 4
    assert (bent[0, :, :, 0].double() - straight)[inner].abs().max() > 12


def test_split_is_every_eighth_from_zero():
    assert every_eighth(20) == (0, 8, 16)
    assert every_eighth(20, 0) == ()


def test_take_keeps_the_split(scene):
    found = take(replace(scene, test=(1, 4)), (4, 2, 0))
    assert found.test == (0,) and found.names[0] == scene.names[4]


def test_sources_beyond_the_training_views_are_refused(scene):
    check_sources(scene, 5)
    with pytest.raises(UserError, match="5 training views but 6 sources"):
        check_sources(scene, 6)


# What bad input gets: a message that names the file or field.


def test_truncated_picture_is_named(scene, folder):
    write_llff(folder, scene)
    victim = folder / "images" / scene.names[3]
    victim.write_bytes(victim.read_bytes()[:200])
    with pytest.raises(UserError, match="view03.png.*truncated"):
        load_scene(folder)


def test_mixed_sizes_are_named(scene, folder):
    write_llff(folder, scene)
    write_png(folder / "images" / scene.names[2], scene.images[2][:, :20])
    with pytest.raises(UserError, match="view02.png: 20×24 pixels.*one size"):
        load_scene(folder)


@pytest.mark.parametrize("pose_rows", [5, 7])
def test_missing_and_extra_llff_poses(scene, folder, pose_rows):
    write_llff(folder, scene)
    rows = np.load(folder / "poses_bounds.npy")
    np.save(folder / "poses_bounds.npy", np.concatenate([rows, rows])[:pose_rows])
    with pytest.raises(UserError, match=f"{pose_rows} poses, but .* has 6 pictures"):
        load_scene(folder)


def test_pose_without_picture_is_named(scene, folder):
    write_transforms(folder, scene)
    (folder / "images" / scene.names[4]).unlink()
    with pytest.raises(UserError, match="pose for images/view04.png, but no such picture"):
        load_scene(folder)


def test_picture_without_pose_is_listed(scene, folder):
    write_transforms(folder, scene)
    write_png(folder / "images" / "stray.png", scene.images[0])
    assert load_scene(folder).dropped == ("stray.png",)


def test_near_beyond_far_is_refused(scene, folder):
    write_transforms(folder, scene)
    with pytest.raises(UserError, match="near 9, far"):
        load_scene(folder, near=9.0)
    with pytest.raises(UserError, match="0 < near < far"):
        load_scene(folder, near=2.0, far=1.0)


def test_one_camera_is_refused(scene):
    with pytest.raises(UserError, match="1 view"):
        take(replace(scene, test=()), (0,))
    with pytest.raises(UserError, match="same point"):
        replace(scene, poses=scene.poses[:1].repeat(len(scene), 1, 1))


def edit(folder, change):
    data = json.loads((folder / "transforms.json").read_text())
    change(data)
    (folder / "transforms.json").write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data["frames"][2].update(transform_matrix=np.zeros((4, 4)).tolist()), "view02.png: the pose is singular"),
        (lambda data: data["frames"][2].update(transform_matrix=(2 * np.eye(4)).tolist()), "view02.png: .* not orthonormal"),
        (lambda data: data["frames"][2].update(transform_matrix=[[1, 2], [3, 4]]), "view02.png has shape"),
        (lambda data: data["frames"][2].pop("transform_matrix"), "view02.png has no 'transform_matrix'"),
        (lambda data: data["frames"][2].pop("file_path"), r"frames\[2\] has no 'file_path'"),
        (lambda data: data["frames"][2].pop("near"), "no 'near' depth for images/view02.png"),
        (lambda data: data["frames"][2].pop("fl_x"), "view02.png has neither 'fl_x'"),
        (lambda data: data["frames"][2].update(fl_x="wide"), "'fl_x' of images/view02.png must be a number"),
        (lambda data: data["frames"][2].update(fl_x=float("nan")), "view02.png: the focal length"),
        (lambda data: data["frames"].append(data["frames"][2]), "two poses for images/view02.png"),
        (lambda data: data["test_filenames"].append("nobody.png"), "names nobody.png"),
        (lambda data: data.pop("frames"), "'frames' must be a list"),
        (lambda data: data.update(w=99), "'w' says 99"),
        (lambda data: data["frames"][2].update(k3=0.1), "view02.png has a lens model"),
    ],
)
def test_broken_transforms_are_named(scene, folder, change, message):
    write_transforms(folder, scene)
    edit(folder, change)
    with pytest.raises(UserError, match=message):
        load_scene(folder)


def test_broken_poses_bounds_is_named(scene, folder):
    (folder / "poses_bounds.npy").write_bytes(b"not an array")
    with pytest.raises(UserError, match="poses_bounds.npy: not a NumPy array"):
        load_scene(folder)
    np.save(folder / "poses_bounds.npy", np.zeros((6, 15)))
    with pytest.raises(UserError, match=r"shape \(6, 15\)"):
        load_scene(folder)


def test_a_folder_without_poses_says_what_to_run(folder):
    with pytest.raises(UserError, match="nvs prepare"):
        load_scene(folder)
    with pytest.raises(UserError, match="no such folder"):
        load_scene(folder / "nowhere")


def test_width_beyond_the_pictures_is_refused(scene, folder):
    write_llff(folder, scene)
    with pytest.raises(UserError, match=r"width 64 asked, but the pictures have widths \[32\]"):
        load_scene(folder, width=64)


def test_read_pictures_turns_photos_upright(tmp_path):
    from PIL import Image

    image = Image.new("RGB", (6, 4))
    exif = image.getexif()
    exif[274] = 6
    image.save(tmp_path / "a.jpg", exif=exif)
    images, size = read_pictures([tmp_path / "a.jpg"])
    assert size == (6, 4) and images.shape == (1, 6, 4, 3)
