"""COLMAP models through pycolmap (an optional extra): reading, writing, and structure from motion on a folder of photos."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch

from shiftaddvit.errors import UserError

from .cameras import invert_pose
from .pictures import read_pictures, undistort
from .scene import Scene, every_eighth, scale_intrinsics

# Index of fx, fy, cx, cy and of k1, k2, p1, p2 in the parameters of each camera model that undistortion covers.
_MODELS: dict[str, tuple[tuple[int, int, int, int], tuple[int, ...]]] = {
    "SIMPLE_PINHOLE": ((0, 0, 1, 2), ()),
    "PINHOLE": ((0, 1, 2, 3), ()),
    "SIMPLE_RADIAL": ((0, 0, 1, 2), (3,)),
    "RADIAL": ((0, 0, 1, 2), (3, 4)),
    "OPENCV": ((0, 1, 2, 3), (4, 5, 6, 7)),
}


def require_pycolmap() -> ModuleType:
    """The pycolmap module, or `UserError` saying how to get it."""
    try:
        import pycolmap
    except ImportError:
        raise UserError("this needs pycolmap, which is not installed: pip install 'shiftaddvit[nvs]'") from None
    return pycolmap


def model_folder(folder: str | os.PathLike) -> Path | None:
    """Where in `folder` the COLMAP model lies, if anywhere."""
    for place in ("sparse/0", "sparse", "."):
        candidate = Path(folder) / place
        if any((candidate / f"cameras.{kind}").is_file() for kind in ("bin", "txt")):
            return candidate
    return None


def read_colmap(folder: str | os.PathLike, width: int | None = None, step: int = 8) -> Scene:
    """A scene from `folder/sparse/0` (or `sparse`) and `folder/images`. Lens distortion is undone; bounds are the 0.1 % and 99.9 %
    percentiles of the depths of the points each view sees."""
    pycolmap = require_pycolmap()
    folder = Path(folder)
    place = model_folder(folder)
    if place is None:
        raise UserError(f"{folder}: no COLMAP model (cameras.bin or cameras.txt) in sparse/0, sparse or the folder itself")
    try:
        model = pycolmap.Reconstruction(str(place))
    except (RuntimeError, ValueError, IndexError) as error:
        raise UserError(f"{place}: not a readable COLMAP model ({error})") from None
    return scene_of(model, folder / "images", folder.resolve().name, width, step)


def scene_of(model: object, pictures: Path, name: str, width: int | None = None, step: int = 8) -> Scene:
    """The scene of a `pycolmap.Reconstruction` whose pictures lie in `pictures`."""
    views = sorted((image for image in model.images.values() if image.has_pose), key=lambda image: image.name)
    if not views:
        raise UserError(f"scene {name!r}: the COLMAP model has no registered picture")
    for view in views:
        if not (pictures / view.name).is_file():
            raise UserError(f"{pictures}: there is a pose for {view.name}, but no such picture")
    images, (height, full_width) = read_pictures([pictures / view.name for view in views], width)
    intrinsics, poses, bounds = [], [], []
    for index, view in enumerate(views):
        camera = model.cameras[view.camera_id]
        if (camera.height, camera.width) != (height, full_width):
            raise UserError(f"{view.name}: the COLMAP camera is {camera.width}×{camera.height}, the picture {full_width}×{height}")
        matrix, lens = _camera(camera, view.name)
        matrix = scale_intrinsics(matrix, images.shape[2] / full_width, images.shape[1] / height)
        if any(lens):
            images[index] = undistort(images[index : index + 1], matrix, lens)[0]
        intrinsics.append(matrix)
        to_camera = torch.eye(4, dtype=torch.float64)
        to_camera[:3] = torch.from_numpy(np.array(view.cam_from_world().matrix()))
        poses.append(invert_pose(to_camera))
        bounds.append(_bounds(model, view, to_camera.numpy()))
    registered = {view.name for view in views}
    return Scene(
        name=name,
        names=tuple(view.name for view in views),
        images=images,
        intrinsics=torch.stack(intrinsics),
        poses=torch.stack(poses),
        bounds=torch.tensor(bounds, dtype=torch.float64),
        test=every_eighth(len(views), step),
        world=torch.eye(4, dtype=torch.float64),
        dropped=tuple(sorted(path.name for path in pictures.iterdir() if path.is_file() and path.name not in registered)),
    )


def _camera(camera: object, name: str) -> tuple[torch.Tensor, tuple[float, float, float, float]]:
    kind = camera.model_name if isinstance(camera.model_name, str) else camera.model.name
    if kind not in _MODELS:
        raise UserError(f"{name}: COLMAP camera model {kind}; allowed: {', '.join(_MODELS)}")
    pinhole, lens = _MODELS[kind]
    fx, fy, cx, cy = (float(camera.params[place]) for place in pinhole)
    found = [float(camera.params[place]) for place in lens]
    matrix = torch.tensor([[fx, 0, cx - 0.5], [0, fy, cy - 0.5], [0, 0, 1]], dtype=torch.float64)
    return matrix, tuple(found + [0.0] * (4 - len(found)))


def _bounds(model: object, view: object, to_camera: np.ndarray) -> tuple[float, float]:
    points = [model.points3D[point.point3D_id] for point in view.points2D if point.has_point3D()]
    # A point that only two views saw is often a wrong match, far away or close by.
    sure = [point for point in points if point.track.length() >= 3]
    places = [point.xyz for point in (sure if len(sure) >= 50 else points)]
    depths = np.array(places).reshape(-1, 3) @ to_camera[2, :3] + to_camera[2, 3]
    depths = depths[depths > 0]
    if len(depths) < 2:
        raise UserError(f"{view.name}: the COLMAP model has no points in front of this view, so its near and far depth are unknown")
    near, far = np.percentile(depths, [0.1, 99.9], method="nearest")
    return float(near), float(far)


def write_colmap(folder: str | os.PathLike, scene: Scene) -> None:
    """Write `folder/sparse/0` in text form: one PINHOLE camera a view, and two points a view on its axis that hold its bounds."""
    pycolmap = require_pycolmap()
    model = pycolmap.Reconstruction()
    for index, name in enumerate(scene.names):
        matrix, pose = scene.intrinsics[index], scene.poses[index]
        parameters = [matrix[0, 0].item(), matrix[1, 1].item(), matrix[0, 2].item() + 0.5, matrix[1, 2].item() + 0.5]
        model.add_camera_with_trivial_rig(
            pycolmap.Camera(
                camera_id=index + 1, model="PINHOLE", width=scene.width, height=scene.height, params=np.array(parameters)
            )
        )
        centre = np.array([parameters[2], parameters[3]])
        image = pycolmap.Image(
            name=Path(name).name,
            camera_id=index + 1,
            image_id=index + 1,
            keypoints=np.stack([centre, centre]),
        )
        model.add_image_with_trivial_frame(image, pycolmap.Rigid3d(invert_pose(pose)[:3].numpy()))
        for point, depth in enumerate(scene.bounds[index].tolist()):
            xyz = pose[:3, 3] + depth * pose[:3, 2]
            model.add_point3D(xyz.numpy(), pycolmap.Track([pycolmap.TrackElement(index + 1, point)]))
    place = Path(folder) / "sparse" / "0"
    place.mkdir(parents=True, exist_ok=True)
    model.write_text(str(place))


@contextmanager
def _quiet(pycolmap: ModuleType) -> Iterator[None]:
    """Without log lines: what goes wrong is said in one of our own."""
    before = pycolmap.logging.minloglevel
    pycolmap.logging.minloglevel = int(pycolmap.logging.Level.FATAL)
    try:
        yield
    finally:
        pycolmap.logging.minloglevel = before


class Motion(NamedTuple):
    """What structure from motion found."""

    model: object
    """The largest `pycolmap.Reconstruction`."""
    registered: tuple[str, ...]
    """Pictures with a pose, sorted."""
    dropped: tuple[str, ...]
    """Pictures without one, sorted."""
    models: int
    """Number of separate models found; all but the largest are left."""


def structure_from_motion(pictures: Path, names: tuple[str, ...], threads: int = -1, seed: int = 0, called: Path | None = None) -> Motion:
    """Poses of the photos `names` in `pictures`, taken by one camera: SIFT, all pairs, incremental mapping; the largest model is kept.

    Raises `UserError` when fewer than two photos register, naming those that do not, and the folder as `called` where that is given.
    """
    pycolmap = require_pycolmap()
    pycolmap.set_random_seed(seed)
    with _quiet(pycolmap), tempfile.TemporaryDirectory() as scratch:
        database = Path(scratch) / "database.db"
        extraction = pycolmap.FeatureExtractionOptions()
        extraction.num_threads = threads
        matching = pycolmap.FeatureMatchingOptions()
        matching.num_threads = threads
        pycolmap.extract_features(
            database, pictures, image_names=list(names), camera_mode=pycolmap.CameraMode.SINGLE,
            extraction_options=extraction, device=pycolmap.Device.cpu,
        )  # fmt: skip
        pycolmap.match_exhaustive(database, matching_options=matching, device=pycolmap.Device.cpu)
        options = pycolmap.IncrementalPipelineOptions()
        options.num_threads = threads
        output = Path(scratch) / "models"
        output.mkdir()
        models = pycolmap.incremental_mapping(database, pictures, output, options=options)
    if not models:
        raise UserError(
            f"none of the {len(names)} photos in {called or pictures} could be placed; "
            "take sharp photos of one still scene that overlap by more than half, walking sideways between them"
        )
    largest = max(models.values(), key=lambda model: model.num_reg_images())
    registered = tuple(sorted(image.name for image in largest.images.values() if image.has_pose))
    dropped = tuple(sorted(set(names) - set(registered)))
    if len(registered) < 2:
        raise UserError(f"only {len(registered)} photo could be placed; not placed: {', '.join(dropped)}")
    return Motion(largest, registered, dropped, len(models))
