"""A mixture for training in one op: the same values and gradients as router, gate and experts written out in float64."""

import pytest
import torch
from ops_checks import Capturable, error, poisoned_outputs

from shiftaddvit.errors import UserError
from shiftaddvit.ops.moe_linear import triton as experts
from shiftaddvit.ops.moe_train import moe_train

BACKENDS = ("reference", "triton")


def problem(tokens, inputs=24, outputs=20, noise=True, seed=0):
    g = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    return normal(tokens, inputs), normal(2, inputs), normal(tokens, 2) if noise else None, normal(2, outputs, inputs), normal(2, outputs)


def written_out(x, router, noise, weight, bias):
    clean = x @ router.t()
    noisy = clean if noise is None else clean + noise
    index = noisy.argmax(1)
    chosen = noisy.softmax(1).gather(1, index.unsqueeze(1))
    y = torch.einsum("mk,mnk->mn", x, weight[index]) + (bias[index] if bias is not None else 0)
    return y * (chosen / chosen.detach()), clean, index


def leaves(tensors, dtype=None):
    return [t if t is None or n == 2 else t.detach().to(dtype or t.dtype).requires_grad_() for n, t in enumerate(tensors)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dispatch", ["dual", "partition"])
@pytest.mark.parametrize(("tokens", "inputs", "outputs", "noise"), [(1, 24, 20, True), (63, 24, 20, False), (600, 24, 20, True), (197, 70, 33, True)])
def test_values_and_gradients(tokens, inputs, outputs, noise, dispatch, backend, monkeypatch):
    monkeypatch.setattr(experts, "prefer_partition", lambda *_: dispatch == "partition")
    tensors = problem(tokens, inputs, outputs, noise)
    ours, theirs = leaves(tensors), leaves(tensors, torch.float64)
    theirs[2] = None if theirs[2] is None else theirs[2].double()
    with poisoned_outputs():
        y, clean, index = moe_train(*ours, backend=backend)
    exact, exact_clean, exact_index = written_out(*theirs)
    assert torch.equal(index.long(), exact_index)
    assert error(y, exact) < 1e-6 and error(clean, exact_clean) < 1e-6
    to_y, to_clean = torch.randn_like(y), torch.randn_like(clean)
    with poisoned_outputs():
        torch.autograd.backward((y, clean), (to_y, to_clean))
    torch.autograd.backward((exact, exact_clean), (to_y.double(), to_clean.double()))
    for name, mine, other in zip(("x", "router", "noise", "weight", "bias"), ours, theirs, strict=True):
        if name != "noise":
            assert error(mine.grad, other.grad) < 1e-5, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_views_and_leading_dimensions(backend):
    x, router, noise, weight, bias = problem(60)
    halves = x.half().t().contiguous().t().reshape(3, 20, 24).requires_grad_(), router, noise.reshape(3, 20, 2), weight.half().requires_grad_(), bias
    y, clean, index = moe_train(*halves, backend=backend)
    exact, exact_clean, exact_index = written_out(x.half().double(), router.double(), noise.double(), weight.half().double(), bias.double())
    assert y.shape == (3, 20, 20) and y.dtype == torch.float16 and clean.dtype == torch.float32
    assert torch.equal(index.reshape(-1).long(), exact_index)
    assert error(y.reshape(60, 20), exact) < 1e-3 and error(clean.reshape(60, 2), exact_clean) < 1e-6
    again = [t.detach().double().requires_grad_() for t in (x.half(), weight.half())]
    grad = torch.randn(20, 3, 20).half()
    y.transpose(0, 1).backward(grad)  # not contiguous behind the transpose
    written_out(again[0], router.double(), noise.double(), again[1], bias.double())[0].backward(grad.transpose(0, 1).reshape(60, 20).double())
    for mine, other in ((halves[0].grad.reshape(60, 24), again[0].grad), (halves[3].grad, again[1].grad)):
        assert mine.dtype == torch.float16 and error(mine, other) < 2e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens_and_one_expert_for_all(backend):
    x, router, noise, weight, bias = leaves(problem(40))
    y, _, _ = moe_train(x[:0], router, noise[:0], weight, bias, backend=backend)
    y.sum().backward()
    assert y.shape == (0, 20) and weight.grad.abs().sum() == 0 and router.grad.abs().sum() == 0
    for one in (0, 1):
        weight.grad = bias.grad = None
        push = torch.zeros(40, 2)
        push[:, one] = 1000
        y, _, index = moe_train(x, router, push, weight, bias, backend=backend)
        y.sum().backward()
        assert (index == one).all() and weight.grad[1 - one].abs().sum() == 0 and bias.grad[one].eq(40).all() and bias.grad[1 - one].eq(0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_token_and_reaches_the_weights(value, backend):
    x, router, noise, weight, bias = leaves(problem(20))
    x.data[3, 5] = value
    y, _, _ = moe_train(x, router, noise, weight, bias, backend=backend)
    y.sum().backward()
    finite = torch.isfinite(y).all(dim=1)
    assert not finite[3] and finite.sum() == 19
    assert not torch.isfinite(weight.grad[:, :, 5]).any() and not torch.isfinite(router.grad[:, 5]).any()
    assert torch.isfinite(x.grad[finite]).all() and torch.isfinite(bias.grad).all()


def test_equal_logits_go_to_the_first():
    x, _, _, weight, bias = problem(8)
    for backend in BACKENDS:
        assert (moe_train(x, torch.zeros(2, 24), None, weight, bias, backend=backend)[2] == 0).all()


def test_opcheck_capture_and_compile():
    x, router, noise, weight, bias = leaves(problem(6))
    torch.library.opcheck(torch.ops.shiftaddvit.moe_train.default, (x, router, noise, weight, bias, "reference"))
    torch.library.opcheck(torch.ops.shiftaddvit.moe_train.default, (x, router, None, weight, None, "reference"))
    compiled = torch.compile(lambda *tensors: moe_train(*tensors)[0], fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, router, noise, weight, bias), moe_train(x, router, noise, weight, bias)[0])
    with Capturable():
        y, clean, _ = moe_train(x, router, noise, weight, bias, backend="triton")
        torch.autograd.backward((y, clean), (torch.ones_like(y), torch.ones_like(clean)))


def test_mistakes_are_named():
    x, router, noise, weight, bias = problem(6)
    for arguments, message in (
        ((x, router[:, :3], noise, weight, bias), r"router must be \(2, 24\), got \(2, 3\)"),
        ((x, router, noise[:3], weight, bias), r"noise must be \(6, 2\)"),
        ((x, router, noise, weight[:1], bias), r"weight must be \(2, out, 24\)"),
        ((x.half(), router, noise, weight, bias), r"weight must be .* of torch.float16"),
        ((x, router.double(), noise, weight, bias), "router must be float32"),
    ):
        with pytest.raises(UserError, match=message):
            moe_train(*arguments)
