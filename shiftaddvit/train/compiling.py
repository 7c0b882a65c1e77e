"""What torch.compile is given of a model that trains."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from shiftaddvit.errors import UserError
from shiftaddvit.layers.attention import ProjectedAttention

Compile = bool | Literal["attention"]
"""The whole model, nothing of it, or converted attention between its projections."""


def check_compile(how: Compile | None) -> None:
    """UserError for what is none."""
    if how not in (True, False, None, "attention"):
        raise UserError(f"compile must be true, false or 'attention', got {how!r}")


@contextmanager
def compiled(model: nn.Module, wrapped: nn.Module, how: Compile) -> Iterator[nn.Module]:
    """`wrapped`, which is or holds `model`, as it trains. With "attention" the formulas of converted attention alone are compiled: a mixture's
    step is one kernel anyway, and takes minutes to trace."""
    if how is True:
        yield torch.compile(wrapped)
        return
    with ExitStack() as stack:
        if how == "attention":
            stack.enter_context(torch._dynamo.config.patch(recompile_limit=64))  # one form a stage of the network, with and without gradients
            for module in model.modules():
                if isinstance(module, ProjectedAttention) and module.enabled:
                    module.attend = _training_only(module, torch.compile(module.attend, dynamic=False))
                    stack.callback(delattr, module, "attend")
        yield wrapped


def _training_only(module: ProjectedAttention, fast: Callable[..., Tensor]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    plain = module.attend

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return fast(q, k, v) if module.training and torch.is_grad_enabled() else plain(q, k, v)

    return attend
