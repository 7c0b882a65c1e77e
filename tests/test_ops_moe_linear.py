"""A mixture of linear experts: dual and partition are the same function, forward and backward, however the tokens are spread."""

import pytest
import torch
from ops_checks import error, poisoned_outputs

from shiftaddvit.errors import UserError
from shiftaddvit.ops.moe_linear import expert_load, moe_linear, routed_linear

WAYS = (("reference", "auto"), ("triton", "dual"), ("triton", "partition"))
SPREADS = ("mixed", "first", "second", "alternating")


def problem(tokens, inputs=24, outputs=20, spread="mixed", seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, inputs, generator=generator)
    weight, bias = torch.randn(2, outputs, inputs, generator=generator), torch.randn(2, outputs, generator=generator)
    gate = torch.rand(tokens, generator=generator) + 0.5
    index = {
        "mixed": torch.randint(0, 2, (tokens,), generator=generator),
        "first": torch.zeros(tokens, dtype=torch.long),
        "second": torch.ones(tokens, dtype=torch.long),
        "alternating": torch.arange(tokens) % 2,
    }[spread]
    return x, index, weight, bias, gate


def token_by_token(x, index, weight, bias, gate):
    """The oracle: a loop."""
    return torch.stack(
        [g * (weight[e].double() @ row.double() + bias[e].double()) for row, e, g in zip(x, index.tolist(), gate.double(), strict=True)]
    )


@pytest.mark.parametrize(("backend", "dispatch"), WAYS)
@pytest.mark.parametrize(("tokens", "spread"), [(1, "mixed"), (63, "first"), (100, "second"), (600, "mixed"), (197, "alternating")])
def test_every_token_meets_its_expert(tokens, spread, backend, dispatch):
    x, index, weight, bias, gate = problem(tokens, spread=spread)
    with poisoned_outputs():
        y = moe_linear(x, index, weight, bias, gate, dispatch, backend)
    assert error(y, token_by_token(x, index, weight, bias, gate)) < 1e-6


@pytest.mark.parametrize(("backend", "dispatch"), WAYS)
@pytest.mark.parametrize("spread", ["mixed", "second"])
def test_gradients_match_autograd_of_the_loop(spread, backend, dispatch):
    x, index, weight, bias, gate = problem(40, 12, 10, spread)
    ours = [t.clone().requires_grad_() for t in (x, weight, bias, gate)]
    theirs = [t.double().requires_grad_() for t in (x, weight, bias, gate)]
    grad = torch.randn(40, 10)
    moe_linear(ours[0], index, *ours[1:], dispatch, backend).backward(grad)
    token_by_token(theirs[0], index, *theirs[1:]).backward(grad.double())
    for name, mine, other in zip(("x", "weight", "bias", "gate"), ours, theirs, strict=True):
        expected = other.grad if other.grad is not None else torch.zeros_like(other)
        assert error(mine.grad, expected) < 1e-5, name


@pytest.mark.parametrize(("backend", "dispatch"), WAYS)
def test_router_inside_decides_like_an_argmax(backend, dispatch):
    x, _, weight, bias, _ = problem(530)
    router = torch.randn(2, 24)
    index = (x @ router.t()).argmax(1)
    with poisoned_outputs():
        y, choice = routed_linear(x.reshape(2, 265, 24), router, weight, bias, dispatch, backend)
    assert torch.equal(choice.reshape(-1).long(), index)
    assert error(y.reshape(530, 20), token_by_token(x, index, weight, bias, torch.ones(530))) < 1e-6
    assert torch.equal(expert_load(choice), torch.bincount(index, minlength=2).int())


@pytest.mark.parametrize(("backend", "dispatch"), WAYS)
def test_nan_and_infinity_stay_in_their_tokens(backend, dispatch):
    x, index, weight, bias, _ = problem(20)
    x[3], x[4, 0] = float("nan"), float("inf")
    y = moe_linear(x, index, weight, bias, None, dispatch, backend)
    assert torch.isnan(y[3]).all() and not torch.isfinite(y[4]).any()
    others = [i for i in range(20) if i not in (3, 4)]
    assert torch.isfinite(y[others]).all()


@pytest.mark.parametrize(("backend", "dispatch"), WAYS)
def test_empty_non_contiguous_and_half(backend, dispatch):
    x, index, weight, bias, gate = problem(30)
    assert moe_linear(x[:0], index[:0], weight, bias, gate[:0], dispatch, backend).shape == (0, 20)
    turned = x.t().contiguous().t()
    assert error(moe_linear(turned, index, weight, bias, gate, dispatch, backend), token_by_token(x, index, weight, bias, gate)) < 1e-6
    y = moe_linear(x.half(), index, weight.half(), bias.half(), gate, dispatch, backend)
    assert error(y, token_by_token(x.half(), index, weight.half(), bias.half(), gate)) < 1e-3


def test_opcheck_compile_and_export():
    x, index, weight, bias, gate = problem(6)
    leaves = [t.requires_grad_() for t in (gate, weight, bias)]
    torch.library.opcheck(
        torch.ops.shiftaddvit.moe_linear.default, (x.requires_grad_(), index, *leaves, "auto", "reference")
    )
    torch.library.opcheck(
        torch.ops.shiftaddvit.routed_linear.default,
        (x.detach(), torch.randn(2, 24), weight.detach(), None, "auto", "reference"),
    )

    class Mixture(torch.nn.Module):
        def forward(self, x, index):
            return moe_linear(x, index, weight, bias, gate)

    compiled = torch.compile(Mixture(), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, index), Mixture()(x, index))
    with torch.no_grad():
        assert torch.equal(torch.export.export(Mixture(), (x, index)).module()(x, index), Mixture()(x, index))


def test_mistakes_are_named():
    x, index, weight, bias, gate = problem(6)
    with pytest.raises(UserError, match=r"index must be \(6,\)"):
        moe_linear(x, index[:5], weight)
    with pytest.raises(UserError, match="dispatch 'sorted'"):
        moe_linear(x, index, weight, dispatch="sorted")
    with pytest.raises(UserError, match="takes 2 experts, got 3"):
        moe_linear(x, index, torch.randn(3, 20, 24), backend="triton")
