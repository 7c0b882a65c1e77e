"""The way in: a model becomes an engine."""

import torch
from torch import nn

from shiftaddvit.errors import UserError
from shiftaddvit.ops.backends import Backend, choose_backend

from .cpu import has_cpu_program
from .cpu.onednn import onednn
from .engine import Engine
from .lower import lower
from .program import Launch
from .tune import tune_once


def deploy(
    model: nn.Module,
    batch_size: int | tuple[int, ...] = 1,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    image_size: int | tuple[int, int] | None = None,
    backend: Backend = "auto",
    pdl: bool | None = None,
    int8: bool = False,
    tune_seconds: float = 120.0,
) -> Engine:
    """An engine with the model's weights as they are now: `engine(images) -> logits (B, classes)` in float32.

    `batch_size` lists the batches that become CUDA graphs on a GPU. `dtype` is bfloat16 on a GPU and float32 on a CPU; `device` the
    model's; `image_size` the one the model was made for. `backend` is that of every op. `pdl` overlaps kernel launches, by
    default where the GPU can (compute capability 9 and newer); results are the same. `int8`, on a CPU: linears whose weights are exact in
    eight bits, as codes of four bits are, take inputs rounded to eight bits, at a scale of each image's own; `describe` says which. Kernels whose tiles nobody has measured on this
    kind of GPU are tuned first, for about `tune_seconds` at most, and the result is kept in the user's cache; 0 takes the tiles as they
    are. The model keeps its own weights, mode and device. UserError names a module that cannot be lowered, or an argument.
    """
    sizes = tuple(batch_size) if isinstance(batch_size, (tuple, list)) else (batch_size,)
    if not sizes or any(not isinstance(size, int) or isinstance(size, bool) or size < 1 for size in sizes):
        raise UserError(f"batch_size must be a positive number or a tuple of them, got {batch_size!r}")
    if not isinstance(model, nn.Module):
        raise UserError(f"model must be a torch module, got {type(model).__name__}")
    where = _device(device, model)
    if dtype is None:
        dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
    choose_backend(backend, torch.empty(0, device=where), ("reference", "triton", "cpu"))
    if int8 and (where.type != "cpu" or dtype != torch.float32 or backend not in ("auto", "cpu")):
        raise UserError(f"int8=True needs device 'cpu', dtype float32 and backend 'auto' or 'cpu', got {where}, {dtype} and {backend!r}")
    if int8 and not onednn().integers:
        raise UserError("int8=True needs oneDNN's 8-bit linears, which this torch or processor does not have: deploy without int8")
    if backend == "cpu" and not has_cpu_program(dtype):
        more = " and, on processors that multiply it, bfloat16" if dtype == torch.bfloat16 else ""
        raise UserError(f"backend 'cpu' computes in float32{more}, got {dtype}; use backend='auto'")
    overlaps = where.type == "cuda" and torch.cuda.get_device_capability(where) >= (9, 0)
    if pdl and not overlaps:
        raise UserError(f"pdl=True needs a GPU of compute capability 9 or newer, the engine is on {where}")
    if tune_seconds < 0:
        raise UserError(f"tune_seconds must not be negative, got {tune_seconds}")
    program, launch = lower(model, dtype, image_size, where), Launch(backend, overlaps and backend != "reference" if pdl is None else pdl)
    if where.type == "cuda" and tune_seconds > 0:
        tune_once(program, sizes, launch, tune_seconds)
    return Engine(program, sizes, launch, int8)


def _device(asked: torch.device | str | None, model: nn.Module) -> torch.device:
    try:
        device = torch.device(asked) if asked is not None else next(model.parameters()).device
    except RuntimeError:
        raise UserError(f"device must be 'cpu' or 'cuda', got {asked!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device must be 'cpu' or 'cuda', got {str(device)!r}")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(f"device {str(device)!r} asked for, but this machine has no CUDA device; use device='cpu'")
        index = device.index if device.index is not None else torch.cuda.current_device()
        if index >= torch.cuda.device_count():
            raise UserError(f"device 'cuda:{index}' asked for, but there are {torch.cuda.device_count()}")
        return torch.device("cuda", index)
    return torch.device("cpu")
