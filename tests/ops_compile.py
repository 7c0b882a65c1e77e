"""Compile the kernels for compute capability 9.0, on any machine, with the very tiles they would be launched with there,
those of the engine overlapping their launches, as they do there.

`python tests/ops_compile.py [op …]` prints one JSON line a launch. Run as a program of its own: the interpreter must be off.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from ops_launches import OPS, REPRESENTATIVE
from ops_sass import unset_uniform
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import __file__ as nvidia
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

TARGET = GPUTarget("cuda", 90, 32)
SHARED_LIMIT = 232448
TYPES = {
    torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int8: "*i8", torch.uint8: "*u8",
    torch.int16: "*i16", torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip


def record_launches(launch) -> list[tuple]:
    """Call a host function on meta tensors and return the launches it would make, without making them."""
    made, run = [], JITFunction.run
    JITFunction.run = lambda self, *args, **kwargs: made.append((self, args, kwargs))
    try:
        launch()
    finally:
        JITFunction.run = run
    return made


def compile_launch(kernel: JITFunction, args: tuple, kwargs: dict) -> dict:
    """Registers, spills, shared memory and matrix instructions of one launch, and the assembler's mistakes."""
    result = compiled(kernel, args, kwargs)
    return {"kernel": kernel.__name__, "warps": result.metadata.num_warps, "shared": result.metadata.shared} | inspect_code(result.asm["cubin"])


def compiled(kernel: JITFunction, args: tuple, kwargs: dict):
    """What a launch would run."""
    options = {name: kwargs[name] for name in ("num_warps", "num_stages", "launch_pdl") if name in kwargs}
    named = dict(zip(kernel.arg_names, args, strict=False)) | {k: v for k, v in kwargs.items() if k in kernel.arg_names}
    unknown = kwargs.keys() - {*kernel.arg_names, "num_warps", "num_stages", "launch_pdl", "grid", "warmup"}
    if unknown:
        raise TypeError(f"{kernel.__name__} has no {', '.join(sorted(unknown))}")
    signature, constants, attrs = {}, {}, {}
    for position, name in enumerate(kernel.arg_names):
        value, general = named[name], kernel.params[position].do_not_specialize
        if isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
            attrs[(position,)] = [["tt.divisibility", 16]]
        elif kernel.params[position].is_constexpr or value is None or (isinstance(value, int) and value == 1 and not general):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, int):
            signature[name] = "i32"
            if value % 16 == 0 and not general:
                attrs[(position,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    return triton.compile(source_of(kernel)(kernel, signature, constants, attrs), target=TARGET, options=options)


def source_of(kernel: JITFunction) -> type[ASTSource]:
    if not kernel.is_gluon():
        return ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    return GluonASTSource


def inspect_code(cubin: bytes) -> dict:
    tool = Path(nvidia).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        code = subprocess.run([tool, "--dump-sass", file.name], capture_output=True, text=True, check=True).stdout
    numbers = {name.lower(): int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return numbers | {
        "spill_instructions": len(re.findall(r"\b(?:LDL|STL)\b", code)),
        "wgmma": len(re.findall(r"\b[HIQ]GMMA\b", code)),
        "mma": len(re.findall(r"\b[HIQ]MMA\b", code)),
        "wide_loads": len(re.findall(r"LDG\.E\.(?:\w+\.)*128|LDGSTS\.E\.(?:\w+\.)*128", code)),
        "instructions": len(re.findall(r"/\*[0-9a-f]{4,5}\*/", code)),
        "unset": unset_uniform(code),
    }


def main(names: list[str]) -> None:
    from shiftaddvit.ops import tiling
    from shiftaddvit.ops.conv_mlp.gluon import has_gluon
    from shiftaddvit.ops.moe_train import triton as mixtures
    from shiftaddvit.ops.patch_embed import triton as patch

    tiling.processors = patch.processors = mixtures.processors = lambda device: 132
    if has_gluon():
        from shiftaddvit.ops.attn_block import triton as block
        from shiftaddvit.ops.conv_mlp import triton as mlp

        mlp.processors = block.processors = tiling.processors
    else:
        del OPS["conv_mlp"], OPS["attn_block"]
    representative = names == ["--representative"]
    for op in OPS if representative or not names else names:
        for label, launch in OPS[op]():
            if representative and label not in REPRESENTATIVE:
                continue
            for kernel, args, kwargs in record_launches(launch):
                print(json.dumps({"launch": label} | compile_launch(kernel, args, kwargs)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
