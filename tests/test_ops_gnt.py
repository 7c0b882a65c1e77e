"""The kernels of view synthesis equal GNT's own layers, on odd sizes, whatever the backend."""

import pytest
import torch
from ops_checks import error, poisoned_outputs

from shiftaddvit.errors import UserError
from shiftaddvit.layers.attention import merge_heads, split_heads
from shiftaddvit.ops.feed_forward import Feed, feed_forward
from shiftaddvit.ops.ray_output import ray_color, ray_weights
from shiftaddvit.ops.ray_query import ray_query
from shiftaddvit.ops.ray_transformer import ray_transformer
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
    norm, bias, feed = norm_of(width), torch.randn(width), feed_of(width, (2, 1))
    shapes = dict(
        query_weight=(16, width), key_weight=(16, width), near_weight=(16, 16), hidden_bias=(16,), pos_weight=(16, 8), pos_bias=(16,),
        logit_weight=(width, 16), value_weight=(width, width), pos_value=(width, 16), out_weight=(width, width),
    )  # fmt: skip
    w = {name: torch.randn(shape) / shape[-1] ** 0.5 for name, shape in shapes.items()}
    w["logit_weight"] *= 20  # sharp, so that the running maximum matters
    with poisoned_outputs():
        y = view_attention(q, x, geometry, norm, 1e-6, **w, out_bias=bias, backend=backend)
        both = view_attention(q, x, geometry, norm, 1e-6, **w, out_bias=bias, feed=feed, backend=backend)

    a = torch.nn.functional.layer_norm(q, (width,), *norm, 1e-6).double()
    w = {name: value.double() for name, value in w.items()}
    near = (geometry.double() @ w["pos_weight"].T + w["pos_bias"]).relu()
    hidden = (x.double() @ w["key_weight"].T + near @ w["near_weight"].T - a @ w["query_weight"].T + w["hidden_bias"]).relu()
    weights = (hidden @ w["logit_weight"].T).masked_fill(geometry[..., 4:5] == 0, -1e9).softmax(dim=0)
    mixed = (weights * (x.double() @ w["value_weight"].T + near @ w["pos_value"].T)).sum(dim=0)
    assert error(y, q + mixed @ w["out_weight"].T + bias) < 1e-5
    assert error(both, fed(y, feed)) < 1e-5


def feed_of(width, experts):
    first, second = experts
    return Feed(
        *norm_of(width), torch.randn(first, 4 * width, width) / 4, torch.randn(first, 4 * width), torch.randn(second, width, 4 * width) / 8,
        torch.randn(second, width), torch.randn(2, width) if first == 2 else None, torch.randn(2, 4 * width) if second == 2 else None,
    )  # fmt: skip


def fed(x, feed):
    """One row at a time, as a mixture is defined."""
    rows = []
    for row in x:
        a = torch.nn.functional.layer_norm(row, row.shape, feed.norm_weight, feed.norm_bias, 1e-6)
        one = int((feed.router1 @ a).argmax()) if feed.router1 is not None else 0
        hidden = (feed.weight1[one] @ a + feed.bias1[one]).relu()
        two = int((feed.router2 @ hidden).argmax()) if feed.router2 is not None else 0
        rows.append(row + feed.weight2[two] @ hidden + feed.bias2[two])
    return torch.stack(rows)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("rows", "width", "experts"), [(1, 16, (1, 1)), (37, 32, (2, 1)), (150, 64, (2, 2)), (33, 64, (1, 2))])
@torch.no_grad()
def test_feed_forward_routes_every_row_in_both_linears(rows, width, experts, backend):
    x, feed = torch.randn(rows, width), feed_of(width, experts)
    with poisoned_outputs():
        y = feed_forward(x, feed, 1e-6, backend=backend)
    assert error(y, fed(x, feed)) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("form", "more"),
    [
        ("softmax", {}), ("token", {}), ("zero", {"low": -1.0}), ("float", {"context_mean": False, "unit": False, "own": False}),
    ],
)  # fmt: skip
@pytest.mark.parametrize(("rays", "samples", "width", "heads", "experts"), [(3, 1, 16, 1, (1, 1)), (2, 45, 64, 4, (2, 2))])
@torch.no_grad()
def test_ray_transformer_is_attention_and_feed_forward(rays, samples, width, heads, experts, form, more, backend):
    x, norm, feed = torch.randn(rays, samples, width), norm_of(width), feed_of(width, experts)
    qkv, proj, bias = torch.randn(3 * width, width) / 4, torch.randn(width, width) / 4, torch.randn(width)
    conv = torch.randn(heads, 5) if form in ("token", "float") else None
    with poisoned_outputs():
        y = ray_transformer(x, heads, norm, 1e-6, qkv, proj, bias, feed, 1e-6, form, conv=conv, backend=backend, **more)

    q, k, v = split_heads(torch.nn.functional.layer_norm(x, (width,), *norm, 1e-6) @ qkv.T, heads, 3)
    if form == "softmax":
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    else:
        low = more.get("low", 0.0)
        q, k = (torch.nn.functional.normalize(part, dim=-1) if form == "float" else code(part, form, low) for part in (q, k))
        mixed = q @ (k.transpose(-1, -2) @ v) / torch.pi / (samples if more.get("context_mean", True) else 1)
        mixed = mixed + (v / 2 if more.get("own", True) else 0)
        mixed = torch.nn.functional.normalize(mixed, dim=-1) if more.get("unit", True) else mixed
        if conv is not None:
            mixed = mixed + torch.nn.functional.conv2d(v, conv[:, None, :, None], padding=(2, 0), groups=heads)
    attended = x + merge_heads(mixed) @ proj.T + bias
    assert error(y, fed(attended.flatten(0, 1), feed).view(x.shape)) < 2e-5


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


def code(x, codes, low=-1.0):
    if codes == "float":
        return torch.nn.functional.normalize(x, dim=-1)
    return torch.where(x > (x.mean(dim=-1, keepdim=True) if codes == "token" else 0), 1.0, low)


def test_wrong_shapes_are_named():
    x, feed = torch.randn(4, 64), feed_of(64, (1, 1))
    with pytest.raises(UserError, match=r"weight2 must be torch.float32 \(1 or 2, 64, 256\)"):
        feed_forward(x, feed._replace(weight2=feed.weight1), 1e-6)
    with pytest.raises(UserError, match="16, 32, 64 or 128 channels"):
        feed_forward(torch.randn(4, 48), feed_of(48, (1, 1)), 1e-6)
    with pytest.raises(UserError, match="one expert none, got 1 experts"):
        feed_forward(x, feed._replace(router1=torch.randn(2, 64)), 1e-6)
    with pytest.raises(UserError, match="codes 'tokens'"):
        ray_weights(torch.randn(1, 2, 16), norm_of(16), 1e-6, torch.randn(16, 16), torch.randn(16, 16), 1, "tokens")
    with pytest.raises(UserError, match="heads of 16, 32 or 64, got 64 in 8 heads"):
        ray_transformer(torch.randn(1, 4, 64), 8, norm_of(64), 1e-6, torch.randn(192, 64), torch.randn(64, 64), None, feed, 1e-6)
