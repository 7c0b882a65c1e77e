"""A folder of photos in, a scene folder out: structure from motion, lens undone, photos that could not be placed named."""

import os
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from shiftaddvit.errors import UserError
from shiftaddvit.files import write_json

from .colmap import require_pycolmap, scene_of, structure_from_motion
from .pictures import SUFFIXES, list_pictures, open_picture, write_jpeg
from .scene import Scene
from .transforms_json import write_transforms


@dataclass(frozen=True)
class Prepared:
    """What came of the photos."""

    folder: Path
    """The scene folder: `images/`, `transforms.json`, `prepare.json`."""
    scene: Scene
    """The same, in memory, in the units of structure from motion."""
    dropped: tuple[str, ...]
    """Photos that could not be placed."""
    models: int
    """Separate models that the photos fell into; the largest was kept."""
    pixel_error: float
    """Mean reprojection error in pixels."""


def prepare(photos: str | os.PathLike, output: str | os.PathLike, longest: int = 1600, threads: int = -1) -> Prepared:
    """Find the cameras of the photos in `photos` and write the scene to `output`, which must be empty or not exist.

    Photos must be of one size (one camera, not zoomed) and are shrunk to `longest` pixels on their longer side. Everything is checked
    and computed before `output` appears.
    """
    require_pycolmap()
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} is not empty; choose a new folder")
    paths = list_pictures(photos)
    apple = [path.name for path in Path(photos).iterdir() if path.suffix.lower() in (".heic", ".heif")]
    if apple:
        raise UserError(f"{photos} has photos that this cannot read, such as {sorted(apple)[0]}: convert them to JPEG first (HEIC is Apple's own format)")
    if len(paths) < 2:
        raise UserError(f"{photos} has {len(paths)} photo{'s' * (len(paths) != 1)} ({', '.join(SUFFIXES)}); at least 2 are needed, 20 to 60 are good")
    with tempfile.TemporaryDirectory() as scratch:
        upright = Path(scratch) / "upright"
        upright.mkdir()
        names = _shrink(paths, upright, longest)
        motion = structure_from_motion(upright, names, threads, called=Path(photos))
        scene = scene_of(motion.model, upright, output.resolve().name)
        made = Path(scratch) / "scene"
        written = tuple(f"{Path(name).stem}.jpg" for name in scene.names)
        for name, image in zip(written, scene.images, strict=True):
            write_jpeg(made / "images" / name, image)
        scene = replace(scene, names=written, dropped=motion.dropped)
        write_transforms(made, scene)
        error = float(motion.model.compute_mean_reprojection_error())
        summary = {"photos": len(paths), "placed": len(written), "dropped": list(motion.dropped), "models": motion.models, "pixel_error": error}
        write_json(made / "prepare.json", summary)
        output.parent.mkdir(parents=True, exist_ok=True)
        if output.exists():
            output.rmdir()
        shutil.copytree(made, output)
    return Prepared(output, scene, motion.dropped, motion.models, error)


def _shrink(paths: list[Path], folder: Path, longest: int) -> tuple[str, ...]:
    """Upright copies of at most `longest` pixels; UserError naming a photo that cannot be read, or of another size or name's stem."""
    size, stems, names = None, {}, []
    for path in paths:
        image = open_picture(path)
        if size is None:
            size = image.size
        elif image.size != size:
            raise UserError(
                f"{path}: {image.width}×{image.height} pixels, but {paths[0].name} has {size[0]}×{size[1]}; "
                "all photos must have one size: hold the camera the same way and do not zoom"
            )
        if path.stem in stems:
            raise UserError(f"{path} and {stems[path.stem]} differ only in their ending; rename one")
        stems[path.stem] = path.name
        factor = min(1.0, longest / max(image.size))
        if factor < 1:
            image = image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.LANCZOS)
        options = {"quality": 97, "subsampling": 0} if path.suffix.lower() in (".jpg", ".jpeg") else {}
        image.save(folder / path.name, **options)
        names.append(path.name)
    return tuple(names)
