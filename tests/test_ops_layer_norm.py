"""LayerNorm and its mean over tokens equal the definition, on views, wide rows and awkward lengths."""

import pytest
import torch
import torch.nn.functional as F
from ops_checks import error, poisoned_outputs

from shiftaddvit.errors import UserError
from shiftaddvit.ops.layer_norm import layer_norm

BACKENDS = ("reference", "triton")


def parameters(width: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(width) + 1, torch.randn(width)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pool", ["none", "mean"])
@pytest.mark.parametrize(("tokens", "width"), [(1, 32), (49, 256), (63, 160), (197, 33), (5, 1000)])
def test_rows_and_their_mean(tokens, width, pool, backend):
    x, (weight, bias) = torch.randn(2, tokens, width) * 3 + 5, parameters(width)
    with poisoned_outputs():
        y = layer_norm(x, weight, bias, 1e-6, pool, backend=backend)
    exact = F.layer_norm(x.double(), (width,), weight.double(), bias.double(), 1e-6)
    assert error(y, exact.mean(1) if pool == "mean" else exact) < 2e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pool", ["none", "mean"])
def test_half_precision_and_views(pool, backend):
    x, (weight, bias) = torch.randn(3, 20, 64).half(), parameters(64)
    y = layer_norm(x[:, 2:], weight, bias, 1e-5, pool, backend=backend)
    exact = F.layer_norm(x[:, 2:].double(), (64,), weight.double(), bias.double(), 1e-5)
    assert y.dtype == (torch.float32 if pool == "mean" else torch.float16)
    assert error(y, exact.mean(1) if pool == "mean" else exact) < (2e-6 if pool == "mean" else 1e-3)
    assert len(layer_norm(x[:0], weight, bias, 1e-5, pool, backend=backend)) == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_in_its_image(backend):
    x, (weight, bias) = torch.randn(2, 7, 32), parameters(32)
    x[0, 3, 5] = float("nan")
    y = layer_norm(x, weight, bias, 1e-6, "mean", backend=backend)
    assert torch.isnan(y[0]).all() and torch.isfinite(y[1]).all()


def test_opcheck_and_mistakes():
    x, (weight, bias) = torch.randn(2, 6, 32), parameters(32)
    for mean in (False, True):
        torch.library.opcheck(torch.ops.shiftaddvit.layer_norm.default, (x, weight, bias, 1e-6, mean, False, "reference"))
    with pytest.raises(UserError, match="weight and bias"):
        layer_norm(x, weight[:3], bias, 1e-6)
    with pytest.raises(UserError, match="pool must be"):
        layer_norm(x, weight, bias, 1e-6, "max")
    with pytest.raises(UserError, match="at least one token"):
        layer_norm(x[:, :0], weight, bias, 1e-6, "mean")
