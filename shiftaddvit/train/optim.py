"""Parameter groups: what may decay, and what has a learning rate of its own."""

from timm.optim import create_optimizer_v2
from torch import nn
from torch.optim import Optimizer

from shiftaddvit.layers.adder import adder_weights
from shiftaddvit.layers.shift import ShiftLayer
from shiftaddvit.reparam.decay import undecayed


def parameter_groups(model: nn.Module, weight_decay: float, lr: float, shift_lr_scale: float, adder_lr_scale: float = 1.0) -> list[dict]:
    """Four groups: matrices (decay) · vectors, routers, token convolutions, embeddings and Q latents (no decay) · PS exponents and
    signs (no decay, lr × `shift_lr_scale`) · adder weights (no decay, lr × `adder_lr_scale`). Weight decay would pull |W| = 2^s to 1,
    signs to 0, and the outputs of an adder to one and the same −Σ|x|."""
    skip = undecayed(model) | set(model.no_weight_decay() if hasattr(model, "no_weight_decay") else ())
    exponents = [module for module in model.modules() if isinstance(module, ShiftLayer) and module.config.variant == "ps"]
    latents = {id(parameter) for module in exponents for parameter in module.latent_parameters()}
    adding = set(map(id, adder_weights(model)))
    decay, plain, shifts, adders = [], [], [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) in latents:
            shifts.append(parameter)
        elif id(parameter) in adding:
            adders.append(parameter)
        elif parameter.ndim <= 1 or name in skip:
            plain.append(parameter)
        else:
            decay.append(parameter)
    groups = [
        {"params": decay, "weight_decay": weight_decay, "lr": lr},
        {"params": plain, "weight_decay": 0.0, "lr": lr},
        {"params": shifts, "weight_decay": 0.0, "lr": lr * shift_lr_scale},
        {"params": adders, "weight_decay": 0.0, "lr": lr * adder_lr_scale},
    ]
    return [group for group in groups if group["params"]]


def clipped_parameters(model: nn.Module) -> list[nn.Parameter]:
    """All but adder weights: their gradients have a length that does not say how far to go, and would use up the norm of all others."""
    adding = set(map(id, adder_weights(model)))
    return [parameter for parameter in model.parameters() if id(parameter) not in adding]


def make_optimizer(
    model: nn.Module, name: str, lr: float, weight_decay: float, shift_lr_scale: float, fused: bool, adder_lr_scale: float = 1.0
) -> Optimizer:
    """timm's optimiser `name` over the groups above; `fused` asks torch's AdamW for its one-kernel step."""
    groups = parameter_groups(model, weight_decay, lr, shift_lr_scale, adder_lr_scale)
    options = {"fused": True} if fused and name in ("adam", "adamw") else {}
    return create_optimizer_v2(groups, opt=name, lr=lr, weight_decay=weight_decay, **options)
