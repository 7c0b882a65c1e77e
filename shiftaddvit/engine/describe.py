"""An engine as a table."""

import os

import torch

from shiftaddvit.ops.backends import choose_backend

from .cpu.onednn import onednn
from .engine import Engine
from .program import tensors_of


def describe(engine: Engine) -> str:
    """One line a step: name, ops, shape of one image's result, primitives, fused or not, kilobytes of weights, on a CPU the libraries that
    compute it; then memory and conditions."""
    program, cpu = engine.program, engine.cpu_program
    rows = [("step", "ops", "tokens×channels", "primitives", "fused", "kB", *(["computed by"] if cpu else []))]
    for number, step in enumerate(program.steps):
        about = step.about()
        size = sum(t.numel() * t.element_size() for t in tensors_of(step))
        rows.append((step.name, about.ops, about.shape, about.primitives, "yes" if about.fused else "no", f"{size / 1e3:.1f}"))
        rows[-1] += (cpu.runners[number].how,) if cpu else ()
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, "", *_conditions(engine), *(f"note: {note}" for note in program.notes)])


def _conditions(engine: Engine) -> list[str]:
    program = engine.program
    probe = torch.empty(0, device=engine.device)
    graphs = ", ".join(map(str, engine.captured_sizes)) or "none"
    name = torch.cuda.get_device_name(engine.device) if engine.device.type == "cuda" else "CPU"
    backend = "cpu" if engine.cpu_program else choose_backend(engine.launch.backend, probe)
    lines = [
        f"{len(program.steps)} steps, weights {program.weight_bytes / 1e6:.2f} MB, {program.dtype}, images {program.image_size}",
        f"{name}, backend {backend}, CUDA graphs for batch {graphs}, torch {torch.__version__}",
    ]
    if engine.cpu_program is not None:
        inputs = "inputs of exact 8-bit weights rounded to 8 bits" if engine.int8 else f"products in {str(engine.dtype).removeprefix('torch.')}"
        together = engine.cpu_program.images or "all"
        lines.append(f"{torch.backends.cpu.get_cpu_capability()} with {onednn()}, {os.cpu_count()} processors, {inputs}, {together} images together")
    if engine.device.type == "cuda":
        lines.append(f"device memory of this process {torch.cuda.memory_reserved(engine.device) / 1e6:.0f} MB")
    if program.mixes_images:
        lines.append("logits depend on the whole batch (threshold 'tensor'): batches are never padded")
    return lines
