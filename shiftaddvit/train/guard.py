"""Finding where a number stopped being finite."""

import torch
from torch import Tensor, nn

from shiftaddvit.errors import UserError


class NotFinite(UserError):
    """The loss became NaN or infinite; the message names the step and the layer."""


@torch.no_grad()
def first_broken_layer(model: nn.Module, images: Tensor) -> str:
    """The first parameter that is not finite, else the first module whose output is not, in the order of a forward over `images`."""
    broken = [name for name, parameter in model.named_parameters() if not torch.isfinite(parameter).all()]
    if broken:
        return f"parameter {broken[0]}" + (f" (and {len(broken) - 1} more)" if len(broken) > 1 else "")
    found: list[str] = []
    handles = [
        module.register_forward_hook(_watcher(found, name or "the model"))
        for name, module in model.named_modules()
        if not any(module.children())
    ]
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()
    return f"the output of {found[0]}" if found else "the loss itself (every layer's output is finite)"


def _watcher(found: list[str], name: str):
    def watch(_module: nn.Module, _inputs: tuple, output: object) -> None:
        tensors = output if isinstance(output, tuple) else (output,)
        if any(isinstance(t, Tensor) and t.is_floating_point() and not torch.isfinite(t).all() for t in tensors):
            found.append(name)

    return watch
