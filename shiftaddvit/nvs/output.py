"""What people see of a rendering or a score: files in a folder, a progress bar, tables."""

import re
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from torch import Tensor

from .evaluate import SceneScore
from .pictures import write_png
from .render import Picture, Renderer, render_path
from .scene import Camera
from .video import depth_picture, error_picture, write_depth, write_video

VIDEOS = ("video.mp4", "depth.mp4")
_FRAME = re.compile(r"\d{3,}\.(png|npy)")


def written_frames(folder: Path) -> list[Path]:
    """What an earlier `write_frames` left in `folder`."""
    found = [path for part in ("", "depth", "error") for path in sorted((folder / part).glob("*")) if _FRAME.fullmatch(path.name)]
    return found + [folder / name for name in VIDEOS if (folder / name).is_file()]


def write_frames(renderer: Renderer, cameras: list[Camera], folder: Path, rate: int, truth: list[Tensor] | None = None) -> float:
    """Render a path into `folder`: 000.png …, depth/ (pictures and float32 `.npy`), error/ where the truth is known, and two videos where
    there are at least two pictures of one size. What an earlier rendering left there is removed. Returns seconds an image (mean)."""
    for old in written_frames(folder):
        old.unlink()
    near, far = (bound / renderer.scene.unit for bound in renderer.scene.depth_range)
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"), TimeRemainingColumn())
    with Progress(*columns, console=Console(file=sys.stderr), transient=True) as progress:
        task = progress.add_task("render", total=len(cameras), note="")

        def seen(number: int, picture: Picture) -> None:
            write_png(folder / f"{number:03d}.png", picture.rgb)
            write_png(folder / "depth" / f"{number:03d}.png", depth_picture(picture.depth, near, far))
            write_depth(folder / "depth" / f"{number:03d}.npy", picture.depth)
            if truth is not None:
                write_png(folder / "error" / f"{number:03d}.png", error_picture(picture.rgb, truth[number]))
            progress.update(task, advance=1, note=f"{picture.seconds:.2f} s an image")

        pictures = render_path(renderer, cameras, seen)
    if len(pictures) > 1 and len({picture.rgb.shape for picture in pictures}) == 1:
        write_video(folder / VIDEOS[0], [picture.rgb for picture in pictures], rate)
        write_video(folder / VIDEOS[1], [depth_picture(picture.depth, near, far) for picture in pictures], rate)
    return float(torch.tensor([picture.seconds for picture in pictures]).mean())


def score_table(score: SceneScore) -> str:
    """A Markdown table of the views and their mean."""
    lines = [f"{score.scene}, {score.width}×{score.height}", "", "| view | PSNR | SSIM | LPIPS | s/image |", "|---|---|---|---|---|"]
    for view in score.views:
        lines.append(f"| {view.name} | {view.psnr:.2f} | {view.ssim:.3f} | {_lpips(view.lpips)} | {view.seconds:.2f} |")
    lines.append(f"| mean | {score.psnr:.2f} | {score.ssim:.3f} | {_lpips(score.lpips)} | {score.seconds:.2f} |")
    return "\n".join(lines)


def _lpips(value: float | None) -> str:
    return "not computed" if value is None else f"{value:.3f}"


def bench_table(result: dict) -> str:
    """A Markdown table: measured seconds and modelled joules in columns of their own, published figures in theirs."""
    lines = [
        f"{result['scene']}, {result['width']}×{result['height']}, {result['conditions']['device']}",
        "",
        "| row | s/image, measured | over GNT | J/image, modelled (eyeriss) | J/image, modelled (paper) | s/image, published | J/image, published |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        cells = [f"{row['seconds']:.3f}", _cell(row["speed_up"], "{:.2f}×"), _cell(row["joules"], "{:.0f}"), _cell(row["joules_paper"], "{:.0f}")]
        cells += [_cell(row["published_seconds"], "{:.1f}", "–"), _cell(row["published_joules"], "{:.0f}", "–")]
        lines.append(f"| {row['row']} | {' | '.join(cells)} |")
    lines += ["", "Modelled: the published network of the row, analytical Eyeriss model; never a measurement."]
    return "\n".join(lines)


def _cell(value: float | None, form: str, empty: str = "not run") -> str:
    return empty if value is None else form.format(value)
