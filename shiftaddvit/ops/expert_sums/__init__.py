"""What the balance loss needs of a mixture's tokens (ShiftAddViT section 4.3): how much of them each expert gets and is likely to win, summed
over all tokens.

The loss of a model with many mixtures is many small kernels; here a mixture's part is one pass forward and one backward. Without a host sync,
so safe inside a CUDA graph, and the same number at every run.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from shiftaddvit.errors import UserError

from ..backends import Backend, choose_backend, same_device
from . import reference


def expert_sums(
    logits: Float[Tensor, "*tokens experts"], clean: Float[Tensor, "*tokens experts"], backend: Backend = "auto"
) -> Float[Tensor, "2 experts"]:
    """The importance of each expert, Σ_x softmax(logits)_i, and below it the load, Σ_x Φ((clean_i − best other logit) / σ_n) with
    σ_n = 1/experts. `logits` are the noisy ones, `clean` those without noise. Differentiable in both; float32.

    The Triton kernels take two experts; `auto` is the reference for any other number.
    """
    if logits.dim() == 0 or logits.shape[-1] == 0 or logits.dtype != torch.float32 or clean.shape != logits.shape or clean.dtype != logits.dtype:
        raise UserError(
            f"logits and clean must both be (*tokens, experts) of torch.float32, got {tuple(logits.shape)} of {logits.dtype} "
            f"and {tuple(clean.shape)} of {clean.dtype}"
        )
    same_device(logits=logits, clean=clean)
    experts = logits.shape[-1]
    if experts != 2:
        if backend == "triton":
            raise UserError(f"the triton backend of expert_sums takes 2 experts, got {experts}; use backend='reference'")
        backend = "reference" if backend == "auto" else backend
    rows = (t.reshape(-1, experts).contiguous() for t in (logits, clean))
    return torch.ops.shiftaddvit.expert_sums(*rows, backend)


@torch.library.custom_op(
    "shiftaddvit::expert_sums", mutates_args=(), schema="(Tensor logits, Tensor clean, str backend) -> Tensor"
)
def _expert_sums(logits, clean, backend):
    if choose_backend(backend, logits) == "triton":
        from . import triton as kernels

        return kernels.expert_sums(logits, clean)
    return reference.expert_sums(logits, clean)


@_expert_sums.register_fake
def _(logits, clean, backend):
    return logits.new_empty(2, logits.shape[1])


@torch.library.custom_op(
    "shiftaddvit::expert_sums_grad",
    mutates_args=(),
    schema="(Tensor logits, Tensor clean, Tensor grad, str backend) -> (Tensor, Tensor)",
)
def _expert_sums_grad(logits, clean, grad, backend):
    if choose_backend(backend, logits) == "triton":
        from . import triton as kernels

        return kernels.gradients(logits, clean, grad)
    return reference.gradients(logits, clean, grad)


@_expert_sums_grad.register_fake
def _(logits, clean, grad, backend):
    return torch.empty_like(logits), torch.empty_like(clean)


def _setup(ctx, inputs, output):
    logits, clean, ctx.backend = inputs
    ctx.save_for_backward(logits, clean)


def _backward(ctx, grad):
    return *torch.ops.shiftaddvit.expert_sums_grad(*ctx.saved_tensors, grad.contiguous(), ctx.backend), None


_expert_sums.register_autograd(_backward, setup_context=_setup)
