"""Measure tiles on this GPU: `python -m shiftaddvit.ops.tune --model pvt_v2_b0 --batch 1 --batch 32`. Results go to the user's cache."""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic

import torch

from shiftaddvit.errors import UserError, unknown
from shiftaddvit.files import write_json

from . import tiling
from .bench_cases import normal
from .fused_mlp import conv_linear, norm_linear
from .linear_attention import attention_encode, attention_mix
from .tiling import Tile, key, next_power
from .timing import copies_for, time_call

_HALF = torch.float16

# Side in tokens, channels, hidden channels, heads of each stage; whether the stage's attention is linear
MODELS = {
    "pvt_v2_b0": ((56, 32, 256, 1, True), (28, 64, 512, 2, True), (14, 160, 640, 5, True), (7, 256, 1024, 8, False)),
    "pvt_v2_b1": ((56, 64, 512, 1, True), (28, 128, 1024, 2, True), (14, 320, 1280, 5, True), (7, 512, 2048, 8, False)),
}


@dataclass(frozen=True)
class Problem:
    """One launch to tune."""

    name: str
    """Its key in the table."""
    inputs: Callable[[], tuple]
    """Fresh arguments."""
    call: Callable[..., object]
    """The op."""
    start: Tile
    """The tile in use without a measurement."""
    bounds: dict[str, tuple[int, int]]
    """The fields of the tile that may change, and between which powers of two."""


def problems(model: str, batch: int, experts: int, device: torch.device) -> Iterator[Problem]:
    """The fused launches of one model at one batch size."""
    from .fused_mlp.triton import conv_tile, norm_tile
    from .linear_attention.triton import encode_tile, mix_tile

    shape = {"m": (16, 128), "n": (32, 256), "warps": (4, 8), "stages": (1, 4)}
    for side, c, hidden, heads, linear in MODELS[model]:
        n, m, d = side * side, batch * side * side, c // heads
        wide, narrow = (normal(2, width) if experts == 2 else None for width in (hidden, c))
        norm = normal(c), normal(c)

        def tokens(b=batch, n=n, c=c) -> tuple:
            return (normal(b, n, c, dtype=_HALF),)

        up = normal(experts, hidden, c, dtype=_HALF)
        yield Problem(
            key(f"norm_linear{experts}", m, hidden, c), tokens,
            lambda x, w=up, g=norm, r=narrow: norm_linear(x, w, None, g, 1e-6, r), norm_tile(m, hidden, c, experts, device), shape,
        )  # fmt: skip
        down, taps, shift = normal(experts, c, hidden, dtype=_HALF), normal(9, hidden, dtype=_HALF), normal(hidden)
        yield Problem(
            key(f"conv_linear{experts}", m, c, hidden),
            lambda b=batch, n=n, c=c, k=hidden: (normal(b, n, k, dtype=_HALF), normal(b, n, c, dtype=_HALF)),
            lambda h, x, z=side, t=taps, s=shift, w=down, r=wide: conv_linear(h, z, z, t, s, w, None, r, x, half_taps=True),
            conv_tile(m, c, hidden, experts, False, device), shape | {"n": (32, min(256, next_power(c))), "k": (32, 128)},
        )  # fmt: skip
        if not linear:
            continue
        qkv, proj = normal(experts, 3 * c, c, dtype=_HALF), normal(experts, c, c, dtype=_HALF)
        yield Problem(
            key(f"encode{experts}", batch, n, c, d), tokens,
            lambda x, w=qkv, h=heads, g=norm, r=narrow: attention_encode(x, w, h, None, g, 1e-6, r),
            encode_tile(batch, n, c, d, experts, device),
            {"m": (16, 128), "k": (32, min(128, next_power(c))), "warps": (4, 8), "stages": (1, 4)},
        )  # fmt: skip
        with torch.no_grad():
            encoded = attention_encode(normal(batch, n, c, dtype=_HALF), qkv, heads, None, norm, 1e-6, narrow)
        conv = normal(heads, 9)
        yield Problem(
            key(f"mix{experts}", batch, n, c, d), tokens,
            lambda x, e=encoded, w=proj, r=narrow, f=conv: attention_mix(e, w, None, r, x, f),
            mix_tile(batch, n, c, d, experts, device),
            {"m": (16, 128), "n": (32, min(256, next_power(c))), "k": (1, 8), "warps": (4, 8)},
        )  # fmt: skip


def neighbours(tile: Tile, bounds: dict[str, tuple[int, int]]) -> Iterator[Tile]:
    """Tiles that differ in one field by one step: doubled or halved, the pipeline one deeper or shallower."""
    for field, (low, high) in bounds.items():
        value = getattr(tile, field)
        steps = (value + 1, value - 1) if field == "stages" else (value * 2, value // 2)
        yield from (replace(tile, **{field: step}) for step in steps if low <= step <= high)


@torch.no_grad()
def tune(problem: Problem, device: torch.device, deadline: float) -> tuple[Tile, float, float, int]:
    """Walk downhill from the tile in use: (best tile, its µs, the µs it started from, tiles tried). A step must gain 1 %."""
    from triton.runtime.errors import OutOfResources

    first = problem.inputs()
    inputs = [first, *(problem.inputs() for _ in range(copies_for(first, 16) - 1))]

    def measure(tile: Tile) -> float:
        with tiling.trial(device, problem.name, tile):
            try:
                return time_call(problem.call, inputs, seconds=0.02).median_us
            except OutOfResources:
                return float("inf")

    best, start = problem.start, measure(problem.start)
    fastest, seen, moved = start, {best}, True
    while moved:
        moved = False
        for tile in neighbours(best, problem.bounds):
            if tile in seen or monotonic() > deadline:
                continue
            seen.add(tile)
            time = measure(tile)
            if time < fastest * 0.99:
                best, fastest, moved = tile, time, True
                break
    return best, fastest, start, len(seen)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", action="append", default=[], help=f"one of {', '.join(MODELS)}; may be repeated")
    parser.add_argument("--batch", type=int, action="append", help="may be repeated; 1, 32 and 256 when left out")
    parser.add_argument("--experts", type=int, action="append", choices=(1, 2), help="1, 2 or both (default)")
    parser.add_argument("--seconds", type=float, default=300.0, help="stop after this long; what was measured is kept")
    parser.add_argument("--out", type=Path, help="write the table here instead of the user's cache")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise UserError("tuning needs a CUDA device")
    device, deadline, found = torch.device("cuda"), monotonic() + arguments.seconds, []
    for model in arguments.model or MODELS:
        if model not in MODELS:
            raise unknown("model", model, MODELS)
        for batch in arguments.batch or (1, 32, 256):
            for experts in arguments.experts or (1, 2):
                for problem in problems(model, batch, experts, device):
                    if monotonic() > deadline:
                        continue
                    best, fastest, start, tried = tune(problem, device, deadline)
                    found.append((problem.name, best))
                    print(f"{problem.name:34s}{start:9.2f} -> {fastest:9.2f} µs, {tried:3d} tried  {best}", flush=True)
    if arguments.out:
        write_json(arguments.out, tiling.as_table(found))
    else:
        print(f"wrote {tiling.save_tuned(device, found)}")


if __name__ == "__main__":
    main()
