"""Softmax attention on merged heads equals the definition, on views and awkward lengths."""

import pytest
import torch
from ops_checks import error, poisoned_outputs

from shiftaddvit.errors import UserError
from shiftaddvit.ops.softmax_attention import softmax_attention

BACKENDS = ("reference", "triton")


def exact(q, k, v, heads):
    q, k, v = (t.double().unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    return ((q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("tokens", "width", "heads"), [(1, 16, 1), (49, 64, 2), (100, 32, 1), (197, 48, 3)])
def test_attention_over_views_of_one_projection(tokens, width, heads, backend):
    q, k, v = torch.randn(2, tokens, 3 * width).split(width, dim=-1)
    with poisoned_outputs():
        y = softmax_attention(q * 3, k, v, heads, backend=backend)
    assert error(y, exact(q * 3, k, v, heads)) < 2e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_fewer_keys_than_queries_half_and_large_scores(backend):
    q, k, v = torch.randn(1, 70, 32), torch.randn(1, 5, 32) * 100, torch.randn(1, 5, 32)
    assert error(softmax_attention(q, k, v, 2, backend=backend), exact(q, k, v, 2)) < 1e-5
    y = softmax_attention(q.half(), k.half(), v.half(), 2, backend=backend)
    assert error(y, exact(q.half(), k.half(), v.half(), 2)) < 2e-3
    assert softmax_attention(q[:0], k[:0], v[:0], 2, backend=backend).shape == (0, 70, 32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_in_its_image(backend):
    x = torch.randn(2, 20, 32)
    x[0, 3] = float("nan")
    y = softmax_attention(x, x, x, 1, backend=backend)
    assert torch.isnan(y[0]).all() and torch.isfinite(y[1]).all()


def test_opcheck_and_mistakes():
    x = torch.randn(1, 6, 32)
    torch.library.opcheck(torch.ops.shiftaddvit.softmax_attention.default, (x, x, x, 2, False, "reference"))
    with pytest.raises(UserError, match="heads must split"):
        softmax_attention(x, x, x, 3)
    with pytest.raises(UserError, match="k and v must be"):
        softmax_attention(x, x, x[:, :3], 2)
