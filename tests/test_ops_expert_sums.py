"""Importance and load of a mixture's experts: sums and gradients equal the written formula; the balance loss equals the loop over layers."""

import pytest
import torch
from ops_checks import Capturable, error, poisoned_outputs
from torch.utils._python_dispatch import TorchDispatchMode

from shiftaddvit.errors import UserError
from shiftaddvit.layers import Routing
from shiftaddvit.losses import balance_loss
from shiftaddvit.ops.expert_sums import expert_sums

BACKENDS = ("reference", "triton")
TOKENS = (0, 1, 63, 197, 3000)


def plain(logits: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
    """The formula, one expert after the other."""
    experts = logits.shape[-1]
    probabilities = logits.exp() / logits.exp().sum(-1, keepdim=True)
    importance = [probabilities[..., i].sum() for i in range(experts)]
    load = []
    for i in range(experts):
        best = torch.cat([logits[..., :i], logits[..., i + 1 :]], -1).amax(-1)
        load.append((0.5 * (1 + torch.erf((clean[..., i] - best) * experts / 2**0.5))).sum())
    return torch.stack([*importance, *load]).reshape(2, experts)


def drawn(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    clean = torch.randn(*shape)
    return clean + torch.randn(*shape) / shape[-1], clean


def compare(inputs, grad, backend, limit=1e-6):
    ours, exact = ([t.detach().to(dtype).requires_grad_() for t in inputs] for dtype in (torch.float32, torch.float64))
    with poisoned_outputs():
        sums = expert_sums(*ours, backend=backend)
        sums.backward(grad)
    expected = plain(*exact)
    expected.backward(grad.double())
    assert sums.dtype == torch.float32 and error(sums, expected) < limit
    for a, b in zip(ours, exact, strict=True):
        assert error(a.grad, b.grad) < limit


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", TOKENS)
def test_sums_and_gradients_follow_the_formula(tokens, backend):
    torch.manual_seed(tokens)
    compare(drawn(tokens, 2), torch.randn(2, 2), backend)
    compare(drawn(2, tokens, 3, 2), torch.tensor([[1.0, 1.0], [0.0, -2.0]]), backend)


@pytest.mark.parametrize("experts", [1, 3, 5])
def test_any_number_of_experts_has_a_reference(experts):
    torch.manual_seed(experts)
    logits, clean = drawn(63, experts)
    if experts == 1:
        assert torch.equal(expert_sums(logits, clean), torch.full((2, 1), 63.0))
    else:
        compare((logits, clean), torch.randn(2, experts), "auto")


def test_competitors_that_tie_share_the_gradient_as_in_amax():
    logits, clean = torch.tensor([[1.0, 2.0, 2.0], [0.5, 0.5, 0.5]]), torch.randn(2, 3)
    compare((logits, clean), torch.randn(2, 3), "reference")


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_are_read_where_they_lie_or_copied(backend):
    logits, clean = drawn(2, 40)
    compare((logits.t(), clean.t()), torch.randn(2, 2), backend)
    wide, kept = torch.randn(30, 7, 5), torch.randn(1, 1, 2)
    compare((wide[::2, :, 1:3], kept.expand(15, 7, 2)), torch.randn(2, 2), backend)
    compare(drawn(9, 2), torch.randn(1, 1).expand(2, 2), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_noise_one_tensor_gets_both_gradients(backend):
    both, exact = (torch.linspace(-3, 3, 26, dtype=dtype).reshape(13, 2).requires_grad_() for dtype in (torch.float32, torch.float64))
    grad = torch.tensor([[0.5, 1.0], [-1.0, 2.0]])
    expert_sums(both, both, backend).backward(grad)
    plain(exact, exact).backward(grad.double())
    assert error(both.grad, exact.grad) < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_visible_and_large_logits_are_exact(backend):
    logits, clean = drawn(700, 2)
    logits[600, 1] = float("nan")
    for tensor in (logits, clean):
        tensor.requires_grad_()
    sums = expert_sums(logits, clean, backend)
    sums.sum().backward()
    assert sums[0].isnan().all() and sums[1].isnan().tolist() == [True, False]
    assert logits.grad[600].isnan().all() and logits.grad.isnan().any(-1).sum() == 1
    large = torch.tensor([[500.0, -500.0], [500.0, -500.0], [-500.0, 500.0]], requires_grad=True)
    sums = expert_sums(large, large, backend)
    sums.backward(torch.randn(2, 2))
    assert torch.equal(sums, torch.tensor([[2.0, 1.0], [2.0, 1.0]])) and torch.equal(large.grad, torch.zeros(3, 2))


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_run_gives_the_same_bits(backend):
    logits, clean = drawn(3000, 2)
    assert torch.equal(expert_sums(logits, clean, backend), expert_sums(logits, clean, backend))


def test_opcheck():
    for experts in (2, 3):
        logits, clean = (t.requires_grad_() for t in drawn(6, experts))
        torch.library.opcheck(torch.ops.shiftaddvit.expert_sums.default, (logits, clean, "reference"))
        arguments = logits.detach(), clean.detach(), torch.randn(2, experts), "reference"
        torch.library.opcheck(torch.ops.shiftaddvit.expert_sums_grad.default, arguments)
    logits, clean = (t.requires_grad_() for t in drawn(6, 2))
    torch.library.opcheck(torch.ops.shiftaddvit.expert_sums.default, (logits, clean, "triton"))


@pytest.mark.parametrize(
    ("logits", "clean"),
    [
        (torch.zeros(4, 2), torch.zeros(4, 3)),
        (torch.zeros(4, 2), torch.zeros(2, 2, 2)),
        (torch.zeros(4, 0), torch.zeros(4, 0)),
        (torch.zeros(()), torch.zeros(())),
        (torch.zeros(4, 2).half(), torch.zeros(4, 2).half()),
        (torch.zeros(4, 2), torch.zeros(4, 2).double()),
    ],
)
def test_bad_shapes_and_dtypes_are_named_in_one_line(logits, clean):
    with pytest.raises(UserError, match=r"logits and clean must both be \(\*tokens, experts\) of torch.float32, got") as raised:
        expert_sums(logits, clean)
    assert "\n" not in str(raised.value) and str(tuple(clean.shape)) in str(raised.value)


def test_other_mistakes_are_named():
    with pytest.raises(UserError, match="takes 2 experts, got 3; use backend='reference'"):
        expert_sums(*drawn(4, 3), backend="triton")
    with pytest.raises(UserError, match="unknown backend 'gluon': allowed: auto, reference, triton"):
        expert_sums(*drawn(4, 2), backend="gluon")
    with pytest.raises(UserError, match="clean is on meta but logits is on cpu"):
        expert_sums(torch.zeros(4, 2), torch.zeros(4, 2, device="meta"))


def records_of(shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float32) -> dict[str, Routing]:
    """Routing with noise; the clean logits are leaves."""
    torch.manual_seed(3)
    records = {}
    for number, shape in enumerate(shapes):
        clean, noise = torch.randn(*shape).to(dtype).requires_grad_(), torch.randn(*shape).to(dtype) / shape[-1]
        logits = clean + noise
        records[str(number)] = Routing(logits.argmax(-1), torch.ones(shape[:-1]), logits, clean)
    return records


@pytest.mark.parametrize("shapes", [
    [(4, 50, 2)],
    [(2, 197, 2), (300, 2), (1, 2), (2, 3, 5, 2)],
    [(2, 40, 3), (60, 2), (7, 4), (2, 31, 2), (9, 3)],
])  # fmt: skip
def test_balance_loss_of_many_layers_is_the_loop_over_them(shapes):
    records, exact = records_of(shapes), records_of(shapes, torch.float64)
    costs = {name: torch.rand(routing.logits.shape[-1]) + 0.2 for name, routing in records.items()}
    loss = balance_loss(records, costs)
    loss.backward()
    terms = []
    for name, routing in exact.items():
        shares = costs[name].double() / costs[name].double().sum()
        for sums in plain(routing.logits, routing.clean_logits):
            x = shares * sums
            terms.append((x - x.mean()).square().mean() / x.mean().square())
    expected = sum(terms) / len(shapes)
    expected.backward()
    assert loss.dtype == torch.float32 and error(loss, expected) < 1e-6
    for name in records:
        assert error(records[name].clean_logits.grad, exact[name].clean_logits.grad) < 3e-6, name


class Calls(TorchDispatchMode):
    """How many operations inside compute something: views do not."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def test_a_layer_more_costs_its_op_alone():
    counts = []
    for layers in (1, 11):
        records = records_of([(20, 2)] * layers)
        costs = {name: torch.tensor([2.0, 1.0]) for name in records}
        with Calls() as forward:
            loss = balance_loss(records, costs)
        leaves = [tensor for routing in records.values() for tensor in (routing.logits, routing.clean_logits)]
        with Calls() as backward:
            torch.autograd.grad(loss, leaves)
        counts.append((forward.count, backward.count))
    (forward_one, backward_one), (forward_many, backward_many) = counts
    assert forward_many - forward_one == 10 and forward_one < 20
    # The gradient's kernel, and the sum of what the noisy and the clean logits get.
    assert backward_many - backward_one <= 20 and backward_one < 30


def test_nothing_that_a_cuda_graph_cannot_record():
    records = records_of([(20, 2), (3, 7, 2), (5, 3)])
    costs = {name: torch.rand(routing.logits.shape[-1]) for name, routing in records.items()}
    with Capturable():
        balance_loss(records, costs).backward()
    assert all(routing.clean_logits.grad.abs().sum() > 0 for routing in records.values())


def test_probabilities_are_computed_when_asked_for():
    (routing,) = records_of([(5, 3)]).values()
    assert "probs" not in routing._fields
    torch.testing.assert_close(routing.probs, routing.logits.exp() / routing.logits.exp().sum(-1, keepdim=True))
