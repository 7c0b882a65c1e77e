"""Runs a Gluon kernel's own Python with torch in place of Gluon: its indices, masks and walk, without layouts, barriers or assembly."""

import types
from dataclasses import dataclass
from itertools import product
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Pointer:
    """An address, or a tensor of them, in elements."""

    memory: Tensor
    offset: Tensor | int = 0

    def __add__(self, offset):
        return Pointer(self.memory, self.offset + offset)

    @property
    def dtype(self):
        return types.SimpleNamespace(element_ty=self.memory.dtype)


@dataclass
class Shared:
    """A view of shared memory, which starts as NaN."""

    memory: Tensor

    def load(self, layout):
        return self.memory.clone()

    def store(self, value):
        assert value.shape == self.memory.shape and value.dtype == self.memory.dtype
        self.memory.copy_(value)

    def slice(self, start, length, dim=0):
        assert 0 <= start and start + length <= self.memory.shape[dim]
        return Shared(self.memory.narrow(dim, start, length))

    def permute(self, order):
        return Shared(self.memory.permute(order))


@dataclass
class Flight:
    """A product under way: what it reads must stay until it is waited for."""

    a: Shared
    b: Shared
    read: Tensor

    @classmethod
    def start(cls, a, b, acc, use_acc=True, is_async=False):
        if isinstance(a, Tensor):
            assert use_acc and is_async
            return acc + a.float() @ b.memory.float()
        assert not use_acc and is_async and acc.shape == (a.memory.shape[0], b.memory.shape[1])
        return cls(a, b, a.memory.clone())

    def land(self):
        assert torch.equal(self.read.nan_to_num(7), self.a.memory.nan_to_num(7)), "overwritten while it was read"
        return self.a.memory.float() @ self.b.memory.float()


def load(pointer, mask=None, other=None):
    where = torch.as_tensor(pointer.offset)
    mask = torch.ones_like(where, dtype=torch.bool) if mask is None else mask.expand_as(where)
    assert where[mask].ge(0).all() and where[mask].lt(pointer.memory.numel()).all(), "outside the tensor"
    value = pointer.memory.flatten()[torch.where(mask, where, 0)]
    return value if other is None else torch.where(mask, value, torch.tensor(other, dtype=value.dtype))


def store(pointer, value, mask):
    mask = mask.expand_as(value)
    where = pointer.offset[mask]
    assert where.ge(0).all() and where.lt(pointer.memory.numel()).all(), "outside the tensor"
    assert len(where.unique()) == len(where) and pointer.memory.flatten()[where].isnan().all(), "stored twice"
    pointer.memory.view(-1)[where] = value[mask]


def allocate(dtype, shape, layout, value=None):
    shared = Shared(torch.full(shape, float("nan"), dtype=dtype))
    if value is not None:
        shared.store(value)
    return shared


def rounded_sum(total, left, middle, right, f0, f1, f2):
    for value, tap in ((left, f0), (middle, f1), (right, f2)):
        total = (total.double() + value.double() * tap.double()).half()
    return total


def from_lane(value, way, lanes):
    groups = value.reshape(8 // lanes, lanes, -1)
    pad = (0, 0, 1, 0) if way == "up" else (0, 0, 0, 1)
    moved = F.pad(groups, pad)[:, :lanes] if way == "up" else F.pad(groups, pad)[:, 1:]
    return moved.reshape(value.shape)


def rounded_down(value):
    near = value.half()
    return torch.where(near.float() > value, torch.nextafter(near, torch.tensor(-torch.inf, dtype=torch.float16)), near)


GL = types.SimpleNamespace(
    float16=torch.float16, float32=torch.float32, int32=torch.int32, int64=torch.int64, constexpr=None, static_range=range,
    arange=lambda start, end, layout: torch.arange(start, end), full=lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype),
    load=load, store=store, where=torch.where, sum=lambda a, axis: a.sum(axis), rsqrt=torch.rsqrt, permute=torch.permute, reshape=torch.reshape,
    split=lambda a: a.unbind(-1), join=lambda a, b: torch.stack([a, b], -1), convert_layout=lambda a, layout, assert_trivial=False: a,
    allocate_shared_memory=allocate,
    **dict.fromkeys(
        ("BlockedLayout", "SliceLayout", "DotOperandLayout", "NVMMADistributedLayout", "NVMMASharedLayout", "SwizzledSharedLayout"), lambda *a: None
    ),
)  # fmt: skip
WITHOUT_GLUON = {
    "gl": GL, "mma_v2": lambda a, b, acc: acc + a.float() @ b.float(), "warpgroup_mma": Flight.start, "fence_async_shared": lambda: None,
    "warpgroup_mma_wait": lambda count, flights: flights[0].land() if isinstance(flights[0], Flight) else flights[0], "barrier": lambda: None, "_add": rounded_sum, "_from_lane": from_lane,
    "_times": lambda a, b: a * b, "_gelu": lambda half: F.gelu(2 * half.float()).half(), "_wait_for_inputs": lambda pdl: None,
    "_pairs": lambda x: Pointer(x.memory.view(torch.int32), x.offset // 2), "_floats": lambda pairs, dtype: pairs.view(dtype).float(),
    "_above": lambda values, level: (values > level).half(), "_down": rounded_down,
    **dict.fromkeys(("adjacent_layout", "column_layout", "out_layout", "rows_layout", "tap_layout"), lambda *a: None),
}  # fmt: skip


class Emulated:
    """In place of a kernel: `kernel[grid](…)`. `modules` are those whose functions it calls."""

    def __init__(self, kernel, *modules):
        names = {}
        for module in modules:
            names |= {name: value for name, value in vars(module).items() if not name.startswith("__")}
        names |= {name: self._plain(value, names) for name, value in names.items() if hasattr(value, "fn")} | WITHOUT_GLUON
        names["__builtins__"] = __builtins__
        self.names, self.run, self.arguments = names, self._plain(kernel, names), kernel.arg_names

    @staticmethod
    def _plain(function, names):
        return types.FunctionType(function.fn.__code__, names)

    def __getitem__(self, grid):
        def launch(*args, num_warps, launch_pdl=False, **flags):
            args = [Pointer(a) if isinstance(a, Tensor) else a for a in args]
            for program in product(*(range(size) for size in grid)):
                with patch.object(GL, "program_id", lambda axis, program=program: torch.tensor(program[axis]), create=True):
                    self.run(*args, **flags)

        return launch
