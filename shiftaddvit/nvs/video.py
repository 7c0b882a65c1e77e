"""What is written of rendered views: depth as a picture and as numbers, error beside the truth, MP4."""

import os
from collections.abc import Iterable

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from shiftaddvit.errors import UserError
from shiftaddvit.files import atomic_write

from .pictures import to_bytes

# Dark blue, teal, yellow-green, light yellow: light is near. Evenly spaced; linear in between.
_STOPS = torch.tensor([[48, 18, 59], [33, 110, 160], [53, 183, 121], [202, 224, 63], [253, 248, 200]]) / 255


def color_ramp(values: Float[Tensor, "*n"]) -> Float[Tensor, "*n 3"]:
    """Values in [0, 1] as colours, dark to light; NaN is black."""
    place = values.nan_to_num(0).clamp(0, 1) * (len(_STOPS) - 1)
    low = place.floor().long().clamp(max=len(_STOPS) - 2)
    share = (place - low).unsqueeze(-1)
    colors = _STOPS[low] * (1 - share) + _STOPS[low + 1] * share
    return torch.where(values.isnan().unsqueeze(-1), 0.0, colors)


def depth_picture(depth: Float[Tensor, "H W"], near: float, far: float) -> Float[Tensor, "H W 3"]:
    """Depth as colours, uniform in inverse depth from `far` (dark) to `near` (light)."""
    return color_ramp((1 / depth - 1 / far) / (1 / near - 1 / far))


def error_picture(rendered: Float[Tensor, "H W 3"], truth: Float[Tensor, "H W 3"], scale: float = 0.25) -> Float[Tensor, "H 3W 3"]:
    """Rendered, true, and their absolute difference (mean over colours; light from `scale` on), side by side."""
    difference = (rendered - truth).abs().mean(dim=-1) / scale
    return torch.cat([rendered, truth, color_ramp(difference)], dim=1)


def write_depth(path: str | os.PathLike, depth: Float[Tensor, "H W"]) -> None:
    """Depth as float32 numbers (`.npy`), atomically."""
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        np.save(file, depth.numpy().astype(np.float32))


def write_video(path: str | os.PathLike, frames: Iterable[Float[Tensor, "H W 3"] | UInt8[Tensor, "H W 3"]], rate: int = 30) -> None:
    """H.264 in MP4 through imageio-ffmpeg (extra `nvs`), atomically; a last row or column is dropped where a side is odd."""
    try:
        import imageio_ffmpeg
    except ImportError:
        raise UserError("writing MP4 needs imageio-ffmpeg, which is not installed: pip install 'shiftaddvit[nvs]'") from None
    frames = [to_bytes(frame).cpu().numpy() for frame in frames]
    height, width = (side - side % 2 for side in frames[0].shape[:2])
    with atomic_write(path) as temporary:
        writer = imageio_ffmpeg.write_frames(
            str(temporary), (width, height), fps=rate, codec="libx264", quality=8, macro_block_size=2,
            output_params=["-f", "mp4"],
        )  # fmt: skip
        writer.send(None)
        try:
            for frame in frames:
                writer.send(np.ascontiguousarray(frame[:height, :width]))
        finally:
            writer.close()
