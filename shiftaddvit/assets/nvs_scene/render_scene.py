"""Makes the pictures beside this file: a still life on a table by a window, path-traced with mitsuba.

    pip install mitsuba
    python render_scene.py OUTPUT [--spp 128]

Writes 24 JPEGs of 252×189, transforms.json with their exact poses, and their exact depth at half that size: 16-bit PNGs of
65535 · NEAR / depth. Everything, textures too, is computed here from fixed seeds.
"""

import argparse
import math
import tempfile
from collections.abc import Callable
from pathlib import Path

import mitsuba as mi
import numpy as np
import torch
from PIL import Image

from shiftaddvit.nvs.cameras import look_at, pixel_grid, pixel_rays
from shiftaddvit.nvs.pictures import write_jpeg
from shiftaddvit.nvs.scene import Scene, every_eighth, scale_intrinsics
from shiftaddvit.nvs.transforms_json import write_transforms

WIDTH, HEIGHT, NEAR = 252, 189, 1.0
FOCAL = 0.5 * WIDTH / math.tan(math.radians(46) / 2)
UP = np.array([0.0, 1.0, 0.0])

mi.set_variant("scalar_rgb")


def noise(shape: tuple[int, int], octaves: int, seed: int, stretch: float = 1.0) -> np.ndarray:
    """Smooth noise in [0, 1]: random grids, each twice as fine, half as strong; `stretch` elongates it along the second axis."""
    random = np.random.default_rng(seed)
    total = np.zeros(shape)
    for octave in range(octaves):
        cells = (2 ** (octave + 2), max(2, int(2 ** (octave + 2) / stretch)))
        grid = Image.fromarray(random.random(cells).astype(np.float32))
        total += np.asarray(grid.resize(shape[::-1], Image.Resampling.BICUBIC)) * 0.5**octave
    return (total - total.min()) / (total.max() - total.min())


def blend(amount: np.ndarray, first: tuple[float, ...], second: tuple[float, ...]) -> np.ndarray:
    return amount[..., None] * np.array(second) + (1 - amount[..., None]) * np.array(first)


def wood() -> np.ndarray:
    grain = noise((512, 512), 6, 1, stretch=8)
    rings = 0.5 + 0.5 * np.sin(40 * noise((512, 512), 3, 2, stretch=6))
    planks = np.repeat(np.random.default_rng(3).uniform(0.75, 1.1, 8), 64)[:, None, None]
    color = blend(0.6 * grain + 0.4 * rings, (0.22, 0.11, 0.05), (0.55, 0.33, 0.17)) * planks
    color[::64] *= 0.35
    color[1::64] *= 0.6
    return color


def wallpaper() -> np.ndarray:
    y, x = np.mgrid[0:512, 0:512] / 512
    pattern = np.sin(2 * np.pi * 9 * (x + 0.02 * np.sin(40 * y))) * np.cos(2 * np.pi * 9 * y)
    dots = np.clip(pattern * 4, 0, 1)
    return blend(dots, (0.52, 0.60, 0.58), (0.75, 0.76, 0.66)) * (0.85 + 0.3 * noise((512, 512), 6, 4))[..., None]


def painting() -> np.ndarray:
    y, x = np.mgrid[0:256, 0:256] / 256
    hills = sum(a * np.sin(2 * np.pi * f * x + p) for a, f, p in ((0.08, 1.0, 0.3), (0.05, 2.3, 1.0), (0.02, 7.1, 2.0)))
    sky = blend(y / 0.6 + 0.2 * noise((256, 256), 5, 5), (0.15, 0.3, 0.65), (0.95, 0.7, 0.45))
    land = blend(noise((256, 256), 6, 6), (0.05, 0.2, 0.08), (0.45, 0.5, 0.15))
    picture = np.where((y > 0.6 + hills)[..., None], land, np.clip(sky, 0, 1))
    sun = np.hypot(x - 0.68, y - 0.33) < 0.09
    return np.where(sun[..., None], np.array([1.0, 0.85, 0.5]), picture)


def globe() -> np.ndarray:
    height = noise((256, 512), 6, 7)
    sea = blend(np.clip(height / 0.52, 0, 1), (0.02, 0.07, 0.25), (0.1, 0.4, 0.6))
    land = blend(np.clip((height - 0.52) / 0.3, 0, 1), (0.2, 0.42, 0.12), (0.75, 0.62, 0.4))
    return np.where((height > 0.52)[..., None], land, sea)


def glaze() -> np.ndarray:
    y, x = np.mgrid[0:256, 0:512]
    zigzag = np.abs((x / 32) % 2 - 1) * 18
    bands = ((y - zigzag) % 64 < 14) & (y > 60) & (y < 220)
    return np.where(bands[..., None], np.array([0.08, 0.2, 0.55]), np.array([0.85, 0.82, 0.75])) * (0.9 + 0.2 * noise((256, 512), 5, 8))[..., None]


def cover(seed: int, base: tuple[float, float, float]) -> np.ndarray:
    random = np.random.default_rng(seed)
    image = np.ones((128, 128, 3)) * np.array(base) * (0.85 + 0.3 * noise((128, 128), 5, seed))[..., None]
    for row in range(20, 110, 14):
        image[row : row + 6, 14 : int(random.uniform(50, 115))] = np.clip(np.array(base) * 0.3 + 0.6, 0, 1)
    return image


def texture(image: np.ndarray, scale: float = 1.0) -> dict:
    data = mi.Bitmap(np.clip(image, 0, 1).astype(np.float32))
    transform = mi.ScalarTransform4f().scale([scale, scale, 1])
    return {"type": "bitmap", "bitmap": data, "raw": True, "to_uv": transform}


def grid_mesh(folder: Path, name: str, rows: int, columns: int, point: Callable[[float, float], tuple[float, float, float]]) -> dict:
    """A surface over (u, v) in the unit square as an OBJ file."""
    lines = []
    for row in range(rows + 1):
        for column in range(columns + 1):
            u, v = column / columns, row / rows
            lines += ["v {:.6f} {:.6f} {:.6f}".format(*point(u, v)), f"vt {u:.6f} {v:.6f}"]
    for row in range(rows):
        for column in range(columns):
            a = row * (columns + 1) + column + 1
            b = a + columns + 1
            lines += [f"f {a}/{a} {a + 1}/{a + 1} {b + 1}/{b + 1}", f"f {a}/{a} {b + 1}/{b + 1} {b}/{b}"]
    path = folder / f"{name}.obj"
    path.write_text("\n".join(lines))
    return {"type": "obj", "filename": str(path)}


def lathe(profile: list[tuple[float, float]], centre: tuple[float, float, float]) -> Callable[[float, float], tuple[float, float, float]]:
    """A surface of revolution about the vertical through `centre`; the profile is (radius, height) pairs."""
    radii, heights = np.array(profile).T
    stops = np.linspace(0, 1, len(profile))

    def point(u: float, v: float) -> tuple[float, float, float]:
        radius, height, angle = np.interp(v, stops, radii), np.interp(v, stops, heights), 2 * math.pi * u
        return centre[0] + radius * math.cos(angle), centre[1] + height, centre[2] + radius * math.sin(angle)

    return point


def leaf(base: np.ndarray, angle: float, lift: float, length: float, width: float) -> Callable[[float, float], tuple[float, float, float]]:
    """A bent blade that starts at `base`, rises, and droops."""
    away, side = np.array([math.cos(angle), 0, math.sin(angle)]), np.array([-math.sin(angle), 0, math.cos(angle)])

    def point(u: float, v: float) -> tuple[float, float, float]:
        half = width * math.sin(math.pi * min(1.0, v * 0.96 + 0.04)) ** 0.8 * (u - 0.5)
        middle = base + away * length * v * math.cos(lift) + UP * length * (v * math.sin(lift) - 0.55 * v * v)
        return tuple(middle + side * half + UP * 0.5 * abs(half))

    return point


def glossy(reflectance: dict, roughness: float) -> dict:
    return {"type": "twosided", "bsdf": {"type": "roughplastic", "diffuse_reflectance": reflectance, "alpha": roughness}}


def rgb(*values: float) -> dict:
    return {"type": "rgb", "value": list(values)}


def still_life(folder: Path) -> dict:
    """The world: table top at y = 0, wall at z = −1.7, cameras near z = 2.6."""
    move = mi.ScalarTransform4f
    world: dict = {
        "type": "scene",
        "integrator": {"type": "path", "max_depth": 6},
        "window": {
            "type": "rectangle",
            "to_world": move().look_at([-3.2, 2.4, 1.2], [0, 0.2, -0.4], [0, 1, 0]).scale([1.1, 1.1, 1]),
            "emitter": {"type": "area", "radiance": rgb(14.0, 13.0, 11.0)},
        },
        "sky": {"type": "constant", "radiance": rgb(0.33, 0.36, 0.42)},
        "table": {
            "type": "rectangle",
            "to_world": move().translate([0, 0, 0.3]).rotate([1, 0, 0], -90).scale([2.6, 2.0, 1]),
            "bsdf": glossy(texture(wood(), 2.0), 0.15),
        },
        "wall": {
            "type": "rectangle",
            "to_world": move().translate([0, 1, -1.7]).scale([4, 2.5, 1]),
            "bsdf": {"type": "diffuse", "reflectance": texture(wallpaper(), 3.0)},
        },
        "frame": {
            "type": "cube",
            "to_world": move().translate([0.55, 1.0, -1.66]).scale([0.52, 0.42, 0.04]),
            "bsdf": glossy(rgb(0.12, 0.07, 0.04), 0.1),
        },
        "painting": {
            "type": "rectangle",
            "to_world": move().translate([0.55, 1.0, -1.615]).scale([0.45, 0.35, 1]),
            "bsdf": {"type": "diffuse", "reflectance": texture(painting()[::-1])},
        },
        "globe": {
            "type": "sphere",
            "center": [0.78, 0.3, 0.05],
            "radius": 0.3,
            "bsdf": glossy(texture(globe()), 0.08),
        },
        "ball": {
            "type": "sphere",
            "center": [-0.12, 0.13, 0.62],
            "radius": 0.13,
            "bsdf": {"type": "roughconductor", "material": "Au", "alpha": 0.2},
        },
        "vase": grid_mesh(folder, "vase", 60, 60, lathe([(0.12, 0), (0.2, 0.12), (0.23, 0.26), (0.17, 0.42), (0.1, 0.52), (0.13, 0.6)], (0.2, 0, -0.45)))
        | {"bsdf": glossy(texture(glaze()), 0.06)},
        "pot": grid_mesh(folder, "pot", 5, 40, lathe([(0.001, 0.002), (0.15, 0.002), (0.21, 0.3), (0.19, 0.3), (0.18, 0.26), (0.001, 0.26)], (-0.75, 0, -0.15)))
        | {"bsdf": glossy(rgb(0.55, 0.22, 0.12), 0.3)},
    }
    for number, (color, width, turn) in enumerate([((0.5, 0.12, 0.1), 0.3, 12), ((0.12, 0.28, 0.2), 0.27, -9), ((0.75, 0.6, 0.25), 0.24, 25)]):
        world[f"book{number}"] = {
            "type": "cube",
            "to_world": move().translate([0.35, 0.05 + 0.09 * number, 0.75]).rotate([0, 1, 0], turn).scale([width, 0.043, 0.7 * width]),
            "bsdf": glossy(texture(cover(20 + number, color)), 0.2),
        }
    random = np.random.default_rng(9)
    for number in range(34):
        base = np.array([-0.75, 0.26, -0.15]) + np.array([0.06, 0, 0.06]) * random.standard_normal(3)
        shape = leaf(base, random.uniform(0, 2 * math.pi), random.uniform(0.9, 1.45), random.uniform(0.45, 0.85), random.uniform(0.05, 0.1))
        green = rgb(random.uniform(0.06, 0.16), random.uniform(0.22, 0.42), random.uniform(0.04, 0.1))
        world[f"leaf{number}"] = grid_mesh(folder, f"leaf{number}", 10, 2, shape) | {"bsdf": glossy(green, 0.25)}
    for number in range(9):
        centre = [random.uniform(-0.55, 0.05), 0.032, random.uniform(0.75, 1.05)]
        color = rgb(*random.uniform(0.1, 0.8, 3))
        world[f"bead{number}"] = {"type": "sphere", "center": centre, "radius": 0.032, "bsdf": glossy(color, 0.05)}
    return world


def viewpoints() -> list[tuple[np.ndarray, np.ndarray]]:
    """Position and target of 24 views: six columns and four rows, each moved a little at random."""
    random = np.random.default_rng(11)
    views = []
    for row in range(4):
        for column in range(6):
            position = np.array([-0.6 + 0.24 * column, 0.42 + 0.17 * row, 2.6]) + random.uniform(-0.05, 0.05, 3)
            views.append((position, np.array([0.05, 0.36, -0.2]) + random.uniform(-0.04, 0.04, 3)))
    return views


def without_fireflies(world: "mi.Scene", sensor: "mi.Sensor", spp: int, seed: int) -> np.ndarray:
    """The mean of eight renderings, less the brightest of each pixel: one lucky path does not make a white dot."""
    passes = np.stack([np.array(mi.render(world, sensor=sensor, spp=max(1, spp // 8), seed=8 * seed + part))[..., :3] for part in range(8)])
    return np.sort(passes, axis=0)[:-1].mean(axis=0).astype(np.float32)


def exact_depth(world: "mi.Scene", intrinsics: torch.Tensor, pose: torch.Tensor, height: int, width: int) -> np.ndarray:
    """Depth along the optical axis at every pixel centre."""
    origin, direction = pixel_rays(pixel_grid(height, width).double(), intrinsics, pose)
    start = origin[0].tolist()
    length = direction.norm(dim=-1)
    hits = [world.ray_intersect(mi.Ray3f(start, heading)).t for heading in (direction / length[:, None]).tolist()]
    return (np.array(hits) / length.numpy()).reshape(height, width)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--spp", type=int, default=128, help="samples a pixel")
    parser.add_argument("--views", type=int, default=24, help="only the first so many views (to try)")
    arguments = parser.parse_args()
    matrix = torch.tensor([[FOCAL, 0, (WIDTH - 1) / 2], [0, FOCAL, (HEIGHT - 1) / 2], [0, 0, 1]], dtype=torch.float64)
    half = (HEIGHT // 2, WIDTH // 2)
    half_matrix = scale_intrinsics(matrix, half[1] / WIDTH, half[0] / HEIGHT)
    (arguments.output / "images").mkdir(parents=True, exist_ok=True)
    (arguments.output / "depth").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        world = mi.load_dict(still_life(Path(folder)))
    names, images, poses, bounds = [], [], [], []
    for number, (position, target) in enumerate(viewpoints()[: arguments.views]):
        sensor = mi.load_dict(
            {
                "type": "perspective",
                "fov": math.degrees(2 * math.atan(0.5 * WIDTH / FOCAL)),
                "to_world": mi.ScalarTransform4f().look_at(position.tolist(), target.tolist(), UP.tolist()),
                "film": {"type": "hdrfilm", "width": WIDTH, "height": HEIGHT, "rfilter": {"type": "box"}},
            }
        )
        linear = without_fireflies(world, sensor, arguments.spp, number)
        image = torch.from_numpy(np.array(mi.Bitmap(linear).convert(mi.Bitmap.PixelFormat.RGB, mi.Struct.Type.UInt8, True)))
        pose = look_at(position, target, UP)
        depth = exact_depth(world, half_matrix, pose, *half)
        names.append(f"view{number:02d}.jpg")
        write_jpeg(arguments.output / "images" / names[-1], image, quality=90)
        Image.fromarray(np.round(65535 * NEAR / depth).astype(np.uint16)).save(arguments.output / "depth" / f"view{number:02d}.png", optimize=True)
        images.append(image)
        poses.append(pose)
        bounds.append([depth.min(), depth.max()])
        print(names[-1], f"depth {depth.min():.3f} … {depth.max():.3f}", flush=True)
    count = len(names)
    scene = Scene(
        name="still life",
        names=tuple(names),
        images=torch.stack(images),
        intrinsics=matrix.repeat(count, 1, 1),
        poses=torch.stack(poses),
        bounds=torch.tensor(bounds, dtype=torch.float64),
        test=every_eighth(count),
        world=torch.eye(4, dtype=torch.float64),
    )
    write_transforms(arguments.output, scene)


if __name__ == "__main__":
    main()
