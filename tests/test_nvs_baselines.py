"""NeRF and the floors."""

import nvs_synthetic
import pytest
import torch

from shiftaddvit.nvs.floors import Nearest, Sweep
from shiftaddvit.nvs.nerf import NeRF, NeRFConfig, NeRFMLP, draw, ndc_rays
from shiftaddvit.nvs.scene import normalise
from shiftaddvit.nvs.sources import camera_rays, encode_bank, make_bank


@pytest.fixture(scope="module")
def scene():
    return normalise(nvs_synthetic.make_scene(views=9, width=48, height=36, spread=0.25))


def psnr(scene, model):
    near, far = scene.depth_range
    bank = encode_bank(make_bank(scene, scene.train, "cpu"), model)
    colors = model(camera_rays(scene.camera(0), near, far), bank.select(bank.order(scene.poses[0])[: model.sources]))
    truth = scene.images[0].reshape(-1, 3).float() / 255
    return -10 * torch.log10((colors.rgb - truth).square().mean()).item(), colors.depth


def test_sweep_is_far_above_nearest_and_finds_depth(scene):
    nearest, _ = psnr(scene, Nearest())
    sweep, depth = psnr(scene, Sweep(sources=6))
    assert sweep > nearest + 6, f"Sweep {sweep:.2f} dB, Nearest {nearest:.2f} dB"
    _, truth = nvs_synthetic.render(*nvs_unscaled(scene), scene.height, scene.width)
    error = (depth.reshape(truth.shape) / scene.unit - truth).abs() / truth
    assert error.median() < 0.05


def nvs_unscaled(scene):
    original = nvs_synthetic.make_scene(views=9, width=48, height=36, spread=0.25)
    return original.intrinsics[0], original.poses[0]


def test_sweep_is_finite_where_no_view_looks(scene):
    near, far = scene.depth_range
    bank = encode_bank(make_bank(scene, scene.train, "cpu"), Sweep())
    rays = camera_rays(scene.camera(0), near, far)
    colors = Sweep()(rays._replace(direction=-rays.direction), bank.select([0, 1, 2]))
    assert torch.isfinite(colors.rgb).all() and torch.isfinite(colors.depth).all()


def test_nerf_has_the_published_parameters():
    mlp = NeRFMLP()
    assert sum(parameter.numel() for parameter in mlp.parameters()) == 595_844
    assert {"pts_linears.5.weight", "views_linears.0.weight", "feature_linear.bias", "alpha_linear.weight", "rgb_linear.bias"} <= set(mlp.state_dict())


def test_ndc_maps_the_near_plane_to_minus_one_and_infinity_to_one():
    origin, direction = torch.tensor([[0.1, -0.2, 0.3]]), torch.tensor([[0.3, 0.1, -1.0]])
    frustum = torch.tensor([1.8, 2.4])
    start, along = ndc_rays(origin, direction, frustum)
    assert start[0, 2].item() == pytest.approx(-1)
    assert (start + along)[0, 2].item() == pytest.approx(1)
    # A point of the ray goes where the projection matrix sends it.
    point = origin + 4.0 * direction
    expected = torch.cat([frustum * point[:, :2] / -point[:, 2:], 1 + 2 / point[:, 2:]], dim=-1)
    t = (expected[0, 2] - start[0, 2]) / along[0, 2]
    assert torch.allclose(start + t * along, expected, atol=1e-6)


def test_nerf_depth_inverts_ndc(scene):
    model = NeRF(NeRFConfig(width=16, samples=4, fine_samples=4)).fit(scene)
    rays = camera_rays(scene.camera(2), *scene.depth_range).chunk(0, 5)
    z = (rays.origin + 3.5 * rays.direction)[:, 2]
    assert torch.allclose(model._depth((1 + 1 / z)[:, None], rays)[:, 0], torch.full((5,), 3.5), atol=1e-4)


def test_draws_follow_the_weights():
    edges = torch.linspace(0, 1, 6).expand(2, 6)
    weights = torch.tensor([[0, 0, 1.0, 0, 0], [0, 0.5, 0, 0.5, 0]])
    found = draw(edges, weights, 64, False)
    inner = found[:, 2:-2]
    assert ((inner[0] >= 0.4 - 1e-3) & (inner[0] <= 0.6 + 1e-3)).all()
    assert ((inner[1] < 0.401) == (inner[1] < 0.5)).all() and abs((inner[1] < 0.5).float().mean() - 0.5) < 0.06
    torch.manual_seed(0)
    assert (draw(edges, weights, 500, True)[1] < 0.5).float().mean().item() == pytest.approx(0.5, abs=0.08)


@pytest.mark.parametrize("ndc", [True, False])
def test_nerf_learns_a_constant_picture(scene, ndc):
    """One colour to learn: the error falls twentyfold and depths are finite."""
    torch.manual_seed(0)
    model = NeRF(NeRFConfig(width=32, samples=8, fine_samples=8, ndc=ndc)).fit(scene).train()
    rays = camera_rays(scene.camera(0), *scene.depth_range).chunk(0, 32)
    target = torch.tensor([0.2, 0.5, 0.8])
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    losses = []
    for _ in range(80):
        colors = model(rays)
        loss = (colors.rgb - target).square().mean() + (colors.coarse - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 20
    assert torch.isfinite(model(rays).depth).all()
