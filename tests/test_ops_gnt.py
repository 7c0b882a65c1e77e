"""The kernels of view synthesis equal GNT's own layers, on odd sizes, whatever the backend."""

import pytest
import torch
from ops_checks import error, poisoned_outputs

from shiftaddvit.errors import UserError
from shiftaddvit.ops.feed_forward import feed_forward
from shiftaddvit.ops.ray_output import ray_color, ray_weights
from shiftaddvit.ops.ray_query import ray_query
from shiftaddvit.ops.view_attention import view_attention

BACKENDS = ("reference", "triton")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def norm_of(width):
    return torch.rand(width) + 0.5, torch.randn(width) / 4


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("points", "views", "width"), [(1, 1, 16), (37, 3, 32), (70, 10, 64)])
@torch.no_grad()
def test_view_attention_is_the_formula(points, views, width, backend):
    q, x, geometry = torch.randn(points, width), torch.randn(views, points, width), torch.randn(views, points, 8)
    geometry[..., 4] = (torch.rand(views, points) > 0.3).float()
    geometry[:, 0, 4] = 0  # a point that no view sees
    geometry[..., 5:] = 0
    norm, bias = norm_of(width), torch.randn(width)
    shapes = dict(
        query_weight=(16, width), key_weight=(16, width), near_weight=(16, 16), hidden_bias=(16,), pos_weight=(16, 8), pos_bias=(16,),
        logit_weight=(width, 16), value_weight=(width, width), pos_value=(width, 16), out_weight=(width, width),
    )  # fmt: skip
    w = {name: torch.randn(shape) / shape[-1] ** 0.5 for name, shape in shapes.items()}
    w["logit_weight"] *= 20  # sharp, so that the running maximum matters
    with poisoned_outputs():
        y = view_attention(q, x, geometry, norm, 1e-6, **w, out_bias=bias, backend=backend)

    a = torch.nn.functional.layer_norm(q, (width,), *norm, 1e-6).double()
    w = {name: value.double() for name, value in w.items()}
    near = (geometry.double() @ w["pos_weight"].T + w["pos_bias"]).relu()
    hidden = (x.double() @ w["key_weight"].T + near @ w["near_weight"].T - a @ w["query_weight"].T + w["hidden_bias"]).relu()
    weights = (hidden @ w["logit_weight"].T).masked_fill(geometry[..., 4:5] == 0, -1e9).softmax(dim=0)
    mixed = (weights * (x.double() @ w["value_weight"].T + near @ w["pos_value"].T)).sum(dim=0)
    assert error(y, q + mixed @ w["out_weight"].T + bias) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("rows", "width", "experts"), [(1, 16, (1, 1)), (37, 32, (2, 1)), (150, 64, (2, 2)), (33, 64, (1, 2))])
@torch.no_grad()
def test_feed_forward_routes_every_row_in_both_linears(rows, width, experts, backend):
    first, second = experts
    x, norm = torch.randn(rows, width), norm_of(width)
    weight1, bias1 = torch.randn(first, 4 * width, width) / 4, torch.randn(first, 4 * width)
    weight2, bias2 = torch.randn(second, width, 4 * width) / 8, torch.randn(second, width)
    router1 = torch.randn(2, width) if first == 2 else None
    router2 = torch.randn(2, 4 * width) if second == 2 else None
    with poisoned_outputs():
        y = feed_forward(x, norm, 1e-6, weight1, bias1, weight2, bias2, router1, router2, backend=backend)
    a = torch.nn.functional.layer_norm(x, (width,), *norm, 1e-6)
    for row in range(rows):
        one = int((router1 @ a[row]).argmax()) if first == 2 else 0
        hidden = (weight1[one] @ a[row] + bias1[one]).relu()
        two = int((router2 @ hidden).argmax()) if second == 2 else 0
        assert error(y[row], x[row] + weight2[two] @ hidden + bias2[two]) < 1e-5, f"row {row}"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("rays", "samples", "width"), [(1, 1, 16), (5, 13, 64)])
@torch.no_grad()
def test_ray_query_encodes_as_the_network_does(rays, samples, width, backend):
    from shiftaddvit.nvs.gnt.transformer import encode_position

    origin, direction, depths = torch.randn(rays, 3), torch.randn(rays, 3), torch.rand(samples) * 8
    q, heading = torch.randn(rays * samples, width), torch.randn(rays, width)
    query, place, out = (torch.randn(width, n) / 8 for n in (width, 64, width))
    bias = torch.randn(width)
    with poisoned_outputs():
        y = ray_query(q, origin, direction, depths, query, place, heading, out, bias, backend=backend)
    points = (origin[:, None] + depths[:, None] * direction[:, None]).flatten(0, 1)
    hidden = q @ query.T + encode_position(points) @ place[:, :63].T + heading.repeat_interleave(samples, dim=0)
    # The interpreter has no fused multiply-add: the highest octave loses some digits of the coordinate.
    assert error(y, hidden.relu() @ out.T + bias) < (1e-5 if backend == "reference" else 2e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("rays", "samples", "width", "heads"), [(2, 1, 16, 1), (3, 70, 64, 4)])
@torch.no_grad()
def test_rays_give_colours_and_weights_that_sum_to_one(rays, samples, width, heads, backend):
    x, norm = torch.randn(rays, samples, width), norm_of(width)
    weight, bias, query, key = torch.randn(3, width), torch.randn(3), torch.randn(width, width) / 4, torch.randn(width, width) / 4
    with poisoned_outputs():
        color = ray_color(x, norm, 1e-5, weight, bias, backend=backend)
    expected = torch.nn.functional.layer_norm(x, (width,), *norm, 1e-5).mean(dim=1) @ weight.T + bias
    assert error(color, expected) < 1e-5
    a = torch.nn.functional.layer_norm(x, (width,), *norm, 1e-6)
    q, k = (a[:, :1] @ query.T).unflatten(-1, (heads, -1)), (a @ key.T).unflatten(-1, (heads, -1))
    for codes in ("softmax", "token", "zero", "float"):
        with poisoned_outputs():
            found = ray_weights(x, norm, 1e-6, query, key, heads, codes, -1.0, backend=backend)
        assert torch.allclose(found.sum(dim=1), torch.ones(rays), atol=1e-5), codes
        if codes == "softmax":
            scores = ((q * k).sum(-1) * (width // heads) ** -0.5).softmax(dim=1)
        else:
            scores = (code(q, codes) * code(k, codes)).sum(-1).clamp_min(0) + 1e-4
            scores = scores / scores.sum(dim=1, keepdim=True)
        assert error(found, scores.mean(dim=-1)) < 1e-5, codes


def code(x, codes):
    if codes == "float":
        return torch.nn.functional.normalize(x, dim=-1)
    return torch.where(x > (x.mean(dim=-1, keepdim=True) if codes == "token" else 0), 1.0, -1.0)


def test_wrong_shapes_are_named():
    x, norm = torch.randn(4, 64), norm_of(64)
    with pytest.raises(UserError, match=r"weight2 must be torch.float32 \(1 or 2, 64, 256\)"):
        feed_forward(x, norm, 1e-6, torch.randn(1, 256, 64), torch.randn(1, 256), torch.randn(1, 256, 64), torch.randn(1, 64))
    with pytest.raises(UserError, match="16, 32, 64 or 128 channels"):
        feed_forward(torch.randn(4, 48), norm_of(48), 1e-6, torch.randn(1, 192, 48), torch.randn(1, 192), torch.randn(1, 48, 192), torch.randn(1, 48))
    with pytest.raises(UserError, match="codes 'tokens'"):
        ray_weights(torch.randn(1, 2, 16), norm_of(16), 1e-6, torch.randn(16, 16), torch.randn(16, 16), 1, "tokens")
