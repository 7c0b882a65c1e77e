"""A tensor that has a shape and no values, and reports every operator that is applied to it."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .streams import BINARY, FREE, POINTWISE

Report = Callable[[str, tuple, Sequence[Tensor]], None]
"""Gets the operator's name (`addmm`), its positional arguments, and the tensors among its results."""


class ShapeTensor(torch.Tensor):
    """What depends on the image, in a forward on shapes alone.

    Weights stay what they are: what is computed from them alone (decoding, quantising) happens once a model, not once an image, and is
    not reported. It says that it is on the CPU, so that code which asks for the device's abilities finds some.
    """

    @staticmethod
    def __new__(cls, meta: Tensor, report: Report, origin: object | None = None) -> "ShapeTensor":
        return torch.Tensor._make_wrapper_subclass(
            cls, meta.shape, strides=meta.stride(), storage_offset=meta.storage_offset(), dtype=meta.dtype, device="cpu"
        )

    def __init__(self, meta: Tensor, report: Report, origin: object | None = None):
        self.meta, self.report = meta, report
        self.origin = object() if origin is None else origin
        """Shared by everything that is computed element by element from one tensor: it is all there when an element passes."""

    @property
    def is_meta(self) -> bool:
        """Layers that check values skip the check."""
        return True

    def __repr__(self) -> str:
        return f"ShapeTensor({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:  # it wants one device, and a learned query has its own
            report = next(x.report for x in (*args, *kwargs.values()) if isinstance(x, ShapeTensor))

            def beside(value: Any) -> Any:
                return cls(value.detach().to("meta"), report) if isinstance(value, Tensor) and not isinstance(value, ShapeTensor) else value

            args, kwargs = tuple(map(beside, args)), {key: beside(value) for key, value in kwargs.items()}
        return super().__torch_function__(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        report: list[Report] = []

        def unwrap(value: Any) -> Any:
            if isinstance(value, ShapeTensor):
                report.append(value.report)
                return value.meta
            if isinstance(value, Tensor):
                return value if value.device.type == "meta" else value.to("meta")
            if isinstance(value, (list, tuple)):
                return type(value)(unwrap(item) for item in value)
            return value

        plain = {key: unwrap(value) for key, value in (kwargs or {}).items()}
        if "device" in plain:
            plain["device"] = "meta"
        name, metas = _name(func), [unwrap(value) for value in args]
        results = _quickly(name, metas) if not plain else None
        if results is None:
            results = func(*metas, **plain)
        found = [item for item in (results if isinstance(results, (list, tuple)) else [results]) if isinstance(item, Tensor)]
        report[0](name, args, found)

        def wrap(value: Any) -> Any:
            if isinstance(value, Tensor):
                return cls(value, report[0], _origin(name, args, value))
            if isinstance(value, (list, tuple)):
                return type(value)(wrap(item) for item in value)
            return value

        return wrap(results)


def _origin(name: str, args: Sequence[Any], result: Tensor) -> object | None:
    """The origin that a result inherits from the operands of its size; None if it begins one."""
    name = name.removesuffix("_")
    if name == "copy" or not (name in POINTWISE or name in BINARY or name in FREE):
        return None
    origins = {x.origin for x in args if isinstance(x, ShapeTensor) and x.numel() == result.numel()}
    return origins.pop() if len(origins) == 1 else None


def _name(func: Any) -> str:
    """`addmm` for aten::addmm.out, `namespace::name` for operators from elsewhere."""
    name = func.name().split(".")[0]
    return name.removeprefix("aten::")


def _quickly(name: str, args: Sequence[Any]) -> Tensor | tuple[Tensor, ...] | None:
    """The result of a common operator on floats, without the general machinery, which would take most of a trace's time."""
    if name in ("_softmax", "_safe_softmax"):
        return torch.empty_like(args[0])
    if name == "native_layer_norm":
        x, over = args[0], len(args[1])
        statistics = torch.empty((*x.shape[: x.dim() - over], *[1] * over), dtype=x.dtype, device="meta")
        return torch.empty_like(x, memory_format=torch.contiguous_format), statistics, statistics
    return _elementwise(name, args)


def _elementwise(name: str, args: Sequence[Any]) -> Tensor | None:
    if name not in POINTWISE and name not in BINARY:
        return None
    tensors = [x for x in args if isinstance(x, Tensor)]
    operands = args[1:3] if name == "where" else args[:2]
    if not all(x.is_floating_point() for x in operands if isinstance(x, Tensor)) or any(isinstance(x, (list, tuple)) for x in args):
        return None
    shape = torch.broadcast_shapes(*(x.shape for x in tensors))
    dtype = tensors[0].dtype
    if "compare" in (POINTWISE.get(name), BINARY.get(name)) and name != "nan_to_num":
        dtype = torch.bool
    elif name in BINARY and isinstance(operands[1], (Tensor, int, float)):
        dtype = torch.result_type(*operands)
    like = next((x for x in tensors if x.shape == shape), None)
    return torch.empty(shape, dtype=dtype, device="meta") if like is None else torch.empty_like(like, dtype=dtype)
