"""What every op's tests share: relative error, outputs that start as NaN, and a watch for what a CUDA graph cannot record."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode

SIZES = (1, 49, 63, 100)
"""Awkward token counts that an interpreted kernel can still afford; the GPU tests add 197 and 3136."""


def error(actual: Tensor, expected: Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖ in float64; NaN anywhere in only one of them gives infinity."""
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    if actual.shape != expected.shape or not torch.equal(actual.isfinite(), expected.isfinite()):
        return float("inf")
    finite = expected.isfinite()
    size = expected[finite].norm()
    return float((actual[finite] - expected[finite]).norm() / size) if size > 0 else float(actual[finite].norm())


@contextmanager
def poisoned_outputs() -> Iterator[None]:
    """`torch.empty` returns NaN (or the largest integer), so that an element a kernel forgot shows."""
    before, fill = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = fill


class Capturable(TorchDispatchMode):
    """Inside, what a capture forbids is an error on any device: tensors made of Python's numbers, and shapes or numbers that the host reads."""

    FORBIDDEN = frozenset((
        "aten::lift_fresh", "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::repeat_interleave.Tensor",
        "aten::_unique2",
    ))  # fmt: skip

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        assert name not in self.FORBIDDEN, f"{name} cannot be captured in a CUDA graph"
        if func.namespace == "shiftaddvit":
            # Its body, so that what it calls is watched too.
            with self:
                return OPDEFS[name]._init_fn(*args, **kwargs or {})
        return func(*args, **kwargs or {})


def random_codes(out_features: int, in_features: int, bits: int, seed: int = 0) -> Tensor:
    """Codes without negative zero, zeros among them."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (out_features, in_features), dtype=torch.uint8, generator=generator)
    return torch.where(codes == 2 ** (bits - 1), 0, codes)


def pick(a, linear):
    """A linear of one or two experts in float64, every row by the expert that its router names."""
    weight, bias, router = linear
    y = torch.einsum("...k,enk->...en", a, weight.double()) + bias.double()
    if router is None:
        return y[..., 0, :]
    return torch.where((a @ router[1].double() > a @ router[0].double()).unsqueeze(-1), y[..., 1, :], y[..., 0, :])
