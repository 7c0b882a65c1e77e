"""Compile `attn_block` for compute capability 9.0 and run what came out on a CPU, against the block in float64.

`python tests/ops_run.py` prints one JSON line a case. Run as a program of its own: Triton's interpreter must be off.
"""

import json
import os

os.environ["TRITON_INTERPRET"] = "0"

import numpy as np
import ops_compile
import torch
from ops_checks import poisoned_outputs
from ptx_machine import run
from test_ops_attn_block import FORMS, exact, problem

from shiftaddvit.ops.attn_block import triton as launches
from shiftaddvit.ops.norm_linear import route_rows
from shiftaddvit.ops.tiling import Tile

# Pictures, tokens, channels, experts of qkv and proj, tokens a step, kind of products, longest run, form, dtype, order of warps.
CASES = (
    (1, 150, 32, 2, 2, 64, 1, 2, FORMS[0], torch.bfloat16, [3, 1, 0, 2]),
    (2, 63, 32, 1, 1, 128, 2, 1, FORMS[6], torch.float16, [0, 1, 2, 3]),
    (2, 117, 64, 2, 2, 64, 2, 1, FORMS[0], torch.bfloat16, [2, 3, 1, 0]),
    (1, 160, 64, 1, 2, 64, 1, 1, FORMS[2], torch.float16, [3, 2, 1, 0]),
)  # fmt: skip


class Memory:
    """Tensors of a launch as bytes, 256 apart."""

    def __init__(self, size: int):
        self.bytes, self.end, self.places = np.full(size, 0xFF, np.uint8), 256, {}

    def place(self, tensor: torch.Tensor) -> int:
        """Where a tensor is, copied there when it is new."""
        if tensor.data_ptr() not in self.places:
            data = tensor.contiguous().view(torch.uint8).reshape(-1).numpy()
            self.places[tensor.data_ptr()] = self.end
            self.bytes[self.end : self.end + len(data)] = data
            self.end += -(-len(data) // 256) * 256 + 256
        return self.places[tensor.data_ptr()]

    def read(self, tensor: torch.Tensor) -> torch.Tensor:
        start = self.places[tensor.data_ptr()]
        return torch.from_numpy(self.bytes[start : start + tensor.nbytes].copy()).view(tensor.dtype).reshape(tensor.shape)


def outcome(batch, tokens, channels, first, second, step, kind, longest, form, dtype, warps) -> dict:
    """How far off the compiled kernels are."""
    x, heads, norm, eps, qkv, conv, proj = problem(batch, tokens, first, second, channels, dtype=torch.float16)
    x = x.to(dtype)
    rows = [route_rows(part[2], torch.float16) if part[2] is not None else None for part in (qkv, proj)]
    launches.attn_tile = lambda *_: Tile(step, 32, longest, 4, kind)
    choices = {"rule": "token", "codes": "zero-one", "local": "own", "context_mean": True, "output_unit": True} | form
    with poisoned_outputs():
        made = ops_compile.record_launches(lambda: launches.attn_block(
            x, eps, *norm, *qkv[:2], rows[0], conv, *proj[:2], rows[1], heads, *choices.values(), True
        ))  # fmt: skip
    memory = Memory(1 << 21)
    for kernel, args, kwargs in made:
        compiled = ops_compile.compiled(kernel, args, kwargs)
        named = dict(zip(kernel.arg_names, args, strict=False)) | {name: kwargs[name] for name in kernel.arg_names if name in kwargs}
        given = [named[p.name] for p in kernel.params if not p.is_constexpr and named[p.name] is not None]
        given = [memory.place(value) if isinstance(value, torch.Tensor) else value for value in given]
        shared = compiled.metadata.shared
        run(compiled.asm["ptx"], 32 * len(warps), kwargs["grid"][0], memory.bytes, dict(enumerate(given)), warps, shared)
    y, expected = memory.read(named["out"]).double(), exact(x, heads, norm, eps, qkv, conv, proj, narrow=True, **form)
    far = (y - expected).norm(dim=-1) / expected.norm(dim=-1)
    return {"finite": bool(y.isfinite().all()), "worst": float(far.max()), "median": float(far.median())}


if __name__ == "__main__":
    for case in CASES:
        print(json.dumps({"case": str(case)} | outcome(*case)), flush=True)
