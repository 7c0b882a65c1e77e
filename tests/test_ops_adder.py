"""Adder products: L1 distances with AdderNet's gradients, equal to the published layer and never materialised."""

from pathlib import Path

import numpy as np
import pytest
import torch
from ops_checks import SIZES, error, poisoned_outputs

from shiftaddvit.errors import UserError
from shiftaddvit.ops.adder import adder_conv2d, adder_linear, adder_scores

BACKENDS = ("reference", "triton")
GOLDEN = Path(__file__).parent / "golden" / "adder2d.npz"


@pytest.mark.parametrize("backend", BACKENDS)
def test_convolution_and_its_gradients_equal_the_published_layer(backend):
    golden = {name: torch.from_numpy(array) for name, array in np.load(GOLDEN).items()}
    x, weight = golden["x"].clone().requires_grad_(), golden["weight"].clone().requires_grad_()
    y = adder_conv2d(x, weight, int(golden["stride"]), int(golden["padding"]), backend=backend)
    y.backward(golden["grad_y"])
    for name, ours in (("y", y), ("grad_x", x.grad), ("grad_weight", weight.grad)):
        assert error(ours, golden[name]) < 2e-6, name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", SIZES)
def test_output_is_minus_the_distance_and_gradients_follow_the_paper(tokens, backend):
    torch.manual_seed(tokens)
    x, weight, grad = torch.randn(tokens, 21), torch.randn(13, 21), torch.randn(tokens, 13)
    ours = [t.clone().requires_grad_() for t in (x, weight)]
    with poisoned_outputs():
        y = adder_linear(*ours, eta=0.0, backend=backend)
        y.backward(grad)
    difference = weight.double()[None] - x.double()[:, None]
    assert error(y, -difference.abs().sum(-1)) < 1e-6
    assert error(ours[0].grad, (difference.clamp(-1, 1) * grad[..., None]).sum(1)) < 1e-6
    assert error(ours[1].grad, (-difference * grad[..., None]).sum(0)) < 2e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("queries", (1, 37))
def test_scores_of_every_head_are_distances_with_clamped_gradients(queries, backend):
    torch.manual_seed(queries)
    q, k, grad = torch.randn(2, 3, queries, 5) * 2, torch.randn(2, 3, 18, 5), torch.randn(2, 3, queries, 18)
    ours = [t.clone().requires_grad_() for t in (q, k)]
    with poisoned_outputs():
        scores = adder_scores(*ours, backend=backend)
        scores.backward(grad)
    difference = (k.unsqueeze(2) - q.unsqueeze(3)).double()  # (B, h, queries, keys, d)
    assert error(scores, -difference.abs().sum(-1)) < 1e-6
    assert error(ours[0].grad, (difference.clamp(-1, 1) * grad[..., None]).sum(3)) < 1e-6
    assert error(ours[1].grad, (-difference.clamp(-1, 1) * grad[..., None]).sum(2)) < 1e-6


def test_weight_gradient_has_the_length_eta_root_numel():
    x, weight = torch.randn(9, 8), torch.randn(5, 8, requires_grad=True)
    adder_linear(x, weight, eta=0.3).sum().backward()
    assert weight.grad.norm().item() == pytest.approx(0.3 * 40**0.5, rel=1e-5)
    still = torch.zeros(5, 8, requires_grad=True)
    (adder_linear(x, still) * 0).sum().backward()
    assert torch.equal(still.grad, torch.zeros(5, 8))


def test_reference_gradient_is_the_same_in_slices(monkeypatch):
    from shiftaddvit.ops.adder import reference

    x, weight, grad = torch.randn(50, 12), torch.randn(7, 12), torch.randn(50, 7)
    whole = reference.grad_x(x, weight, grad)
    groups = [t.unsqueeze(0).expand(3, -1, -1) for t in (x, weight, grad)]
    for size in (200, 10_000):
        monkeypatch.setattr(reference, "SLICE", size)
        assert error(reference.grad_x(x, weight, grad), whole) < 1e-6
        assert error(reference.grad_x(*groups), whole.expand(3, -1, -1)) < 1e-6


def test_no_difference_tensor_exists():
    """200 × 100 × 300 differences would be 6 million numbers; forward and backward hold a small part of them at a time."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from shiftaddvit.ops.adder import reference

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            self.elements = max(self.elements, *(t.numel() for t in result) if isinstance(result, (tuple, list)) else [result.numel()])
            return result

    x, weight, grad = torch.randn(200, 300), torch.randn(100, 300), torch.randn(200, 100)
    with Largest() as largest:
        reference.distance(x, weight)
        reference.grad_x(x, weight, grad)
        reference.grad_weight(x, weight, grad, 0.2)
    assert 0 < largest.elements <= 1 << 18


@pytest.mark.parametrize("backend", BACKENDS)
def test_infinity_nan_empty_and_shapes(backend):
    x, weight = torch.zeros(4, 6), torch.ones(3, 6)
    x[1, 2], x[2, 0] = float("inf"), float("nan")
    y = adder_linear(x, weight, backend=backend)
    assert (y[1] == -float("inf")).all() and torch.isnan(y[2]).all() and (y[[0, 3]] == -6).all()
    assert adder_linear(x[:0].reshape(2, 0, 6), weight, backend=backend).shape == (2, 0, 3)
    turned = torch.randn(6, 5).t()
    assert error(adder_linear(turned, weight, backend=backend), -torch.cdist(turned.double(), weight.double(), p=1)) < 1e-6


def test_opcheck_compile_and_export():
    x, weight = torch.randn(5, 6, requires_grad=True), torch.randn(4, 6, requires_grad=True)
    torch.library.opcheck(torch.ops.shiftaddvit.adder.default, (x, weight, 0.2, "reference"))
    torch.library.opcheck(torch.ops.shiftaddvit.adder_grad_x.default, (x.detach(), weight.detach(), torch.randn(5, 4), "reference"))
    heads = torch.randn(2, 1, 5, 3, requires_grad=True), torch.randn(2, 1, 4, 3, requires_grad=True)
    torch.library.opcheck(torch.ops.shiftaddvit.adder_scores.default, (*heads, "reference"))

    class Adder(torch.nn.Module):
        def forward(self, x, weight):
            return adder_linear(x, weight)

    inputs = x.detach(), weight.detach()
    assert torch.equal(torch.compile(Adder(), fullgraph=True, backend="aot_eager")(*inputs), Adder()(*inputs))
    assert torch.equal(torch.export.export(Adder(), inputs).module()(*inputs), Adder()(*inputs))


def test_mistakes_are_named():
    with pytest.raises(UserError, match=r"weight must be \(out, 6\)"):
        adder_linear(torch.randn(2, 6), torch.randn(3, 5))
    with pytest.raises(UserError, match="eta must be"):
        adder_linear(torch.randn(2, 6), torch.randn(3, 6), eta=-1)
