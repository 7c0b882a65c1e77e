"""Which implementation of an op runs: asked for by name, or chosen by `auto`, never changed silently."""

import os
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

from shiftaddvit.errors import UserError, unknown

Backend = Literal["auto", "reference", "triton", "cpu"]

_OLDEST = (8, 0)
"""Compute capability with bf16 matrix units."""


def choose_backend(backend: str, x: Tensor, has: tuple[str, ...] = ("reference", "triton")) -> str:
    """The implementation that `backend` means for a tensor like `x`, out of those an op has.

    `auto` is `triton` on a GPU that has bf16 matrix units, `cpu` on a CPU where the op has one, else `reference`.
    `UserError` when the one asked for cannot run here, saying why and what can.
    """
    if backend == "auto":
        if x.is_cuda:
            return "triton" if "triton" in has and _why_no_triton(x) is None else "reference"
        return "cpu" if "cpu" in has and x.device.type == "cpu" else "reference"
    if backend not in ("reference", "triton", "cpu"):
        raise unknown("backend", backend, ("auto", *has))
    if backend not in has:
        raise UserError(f"this op has no backend {backend!r}: allowed: {', '.join(('auto', *has))}")
    if backend == "cpu" and x.device.type != "cpu":
        raise UserError(f"backend 'cpu' needs tensors on the CPU, got {x.device}; use 'triton' or 'reference'")
    reason = _why_no_triton(x) if backend == "triton" else None
    if reason:
        raise UserError(f"backend 'triton' cannot run: {reason}; use 'reference' or 'auto'")
    return backend


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter, on the CPU (environment variable TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def mixable(first: Tensor, second: Tensor) -> bool:
    """Whether one kernel takes both: equal dtypes, or float16 and bfloat16."""
    halves = (torch.float16, torch.bfloat16)
    return first.dtype == second.dtype or (first.dtype in halves and second.dtype in halves)


def overlapping(pdl: bool, *weights: Tensor | None) -> bool:
    """`pdl`, unless one of the weights must be made contiguous first: overlapped kernels read weights before they wait for the kernel in
    front of them, which would be that copy."""
    return pdl and all(weight is None or weight.is_contiguous() for weight in weights)


def same_device(**tensors: Tensor | None) -> torch.device:
    """The device of all tensors given; `UserError` naming the first one that is elsewhere."""
    first_name, first = None, None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if first is None:
            first_name, first = name, tensor
        elif tensor.device != first.device:
            raise UserError(f"{name} is on {tensor.device} but {first_name} is on {first.device}: all must be on one device")
    return first.device


def as_rows(x: Tensor) -> Tensor:
    """x (*tokens, channels) as (M, channels) whose channels lie side by side, as kernels read it."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _why_no_triton(x: Tensor) -> str | None:
    if find_spec("triton") is None:
        return "the package triton is not installed"
    if x.is_cuda:
        capability = torch.cuda.get_device_capability(x.device)
        if capability < _OLDEST:
            return f"{torch.cuda.get_device_name(x.device)} has compute capability {capability}, the kernels need {_OLDEST} or newer"
        return None
    if x.device.type == "cpu" and interpreting():
        return None
    return f"its kernels need a CUDA device, the tensor is on {x.device}"
