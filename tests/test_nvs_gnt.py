"""GNT: parity with the published network, and what must not change its answer."""

from pathlib import Path

import numpy as np
import nvs_synthetic
import pytest
import torch

from shiftaddvit.errors import UserError
from shiftaddvit.nvs.gnt import GNT, GNTConfig
from shiftaddvit.nvs.gnt.transformer import GNTTransformer, encode_position
from shiftaddvit.nvs.projector import Seen, look_up, sample_depths
from shiftaddvit.nvs.scene import normalise
from shiftaddvit.nvs.sources import Sources, camera_rays, encode_bank, make_bank

GOLDEN = Path(__file__).parent / "golden" / "gnt_transformer.npz"
TINY = GNTConfig(width=16, depth=2, samples=12, sources=4, feature_channels=8, feature_base=8)


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.fixture(scope="module")
def asked():
    """A tiny GNT in evaluation, rays of one view, and its sources with features."""
    torch.manual_seed(0)
    scene = normalise(nvs_synthetic.make_scene(width=48, height=36))
    model = GNT(TINY).eval()
    bank = encode_bank(make_bank(scene, scene.train, "cpu"), model)
    near, far = scene.depth_range
    rays = camera_rays(scene.camera(0), near, far).chunk(300, 64)
    return model, rays, bank.select(bank.order(scene.poses[0])[:4])


def test_transformer_equals_the_published_one():
    golden = np.load(GOLDEN)
    weights = {key[2:].replace("/", "."): torch.from_numpy(golden[key]) for key in golden.files if key.startswith("w.")}
    model = GNTTransformer(int(golden["netwidth"]), int(golden["depth"])).eval()
    model.load_state_dict(weights, strict=True)
    seen = Seen(*(torch.from_numpy(golden[key]) for key in ("rgb_feat", "ray_diff", "mask")))
    with torch.no_grad():
        rgb, attention = model(seen, torch.from_numpy(golden["pts"]), torch.from_numpy(golden["ray_d"]))
    expected = torch.from_numpy(golden["y"])
    assert (rgb - expected[:, :3]).abs().max() < 1e-6, "colour"
    assert (attention - expected[:, 3:]).abs().max() < 1e-6, "attention along the ray"


def test_parameter_counts_are_the_published_ones():
    model = GNT()
    assert count(model.feature_net) == 8_877_056
    assert count(model.net_coarse) == 444_739
    assert count(GNTTransformer(depth=8)) == 882_691


def test_feature_net_has_the_published_key_names():
    keys = set(GNT(TINY).feature_net.state_dict())
    expected = {"conv1.weight", "bn1.weight", "layer1.0.downsample.0.weight", "layer2.3.conv2.weight", "layer3.5.bn2.bias"}
    expected |= {"upconv3.conv.conv.bias", "upconv2.conv.bn.weight", "iconv3.conv.weight", "iconv2.bn.bias", "out_conv.weight"}
    assert expected <= keys
    assert not any("running" in key for key in keys)


@pytest.mark.parametrize("size", [(32, 40), (37, 51), (94, 126)])
def test_feature_net_keeps_a_quarter_of_the_resolution(size):
    features = GNT(TINY).feature_net(torch.rand(1, 3, *size))
    assert features.shape[:2] == (1, 8)
    for side, found in zip(size, features.shape[2:], strict=True):
        assert abs(found - side / 4) <= 3.5


def test_feature_of_a_view_does_not_depend_on_the_others():
    torch.manual_seed(0)
    # In double precision: in float32 some processors' convolutions round otherwise for three pictures than for one.
    net = GNT(TINY).eval().double()
    images = torch.rand(3, 3, 40, 40, dtype=torch.float64)
    assert torch.allclose(net.encode(images)[1:2], net.encode(images[1:2]), rtol=0, atol=1e-12)


def test_permuting_source_views_changes_nothing(asked):
    model, rays, sources = asked
    order = torch.tensor([2, 0, 3, 1])
    shuffled = Sources(*(part[order] for part in sources))
    with torch.no_grad():
        first, second = model(rays, sources), model(rays, shuffled)
    assert torch.allclose(first.rgb, second.rgb, atol=1e-5)
    assert torch.allclose(first.depth, second.depth, atol=1e-4)


def test_chunks_change_nothing(asked):
    model, rays, sources = asked
    with torch.no_grad():
        whole = model(rays, sources)
        parts = [model(rays.chunk(start, 7), sources) for start in range(0, 64, 7)]
    assert torch.allclose(whole.rgb, torch.cat([part.rgb for part in parts]), atol=1e-5)
    assert torch.allclose(whole.depth, torch.cat([part.depth for part in parts]), atol=1e-4)


def test_fully_masked_samples_are_finite(asked):
    """Rays that no source view sees: a finite colour and depth, and finite gradients."""
    model, rays, sources = asked
    away = rays._replace(direction=-rays.direction)
    model.zero_grad()
    points = away.origin[:, None] + sample_depths(64, 12, away.near, away.far, False, "cpu")[..., None] * away.direction[:, None]
    assert look_up(points, away.origin, sources).mask.sum() == 0
    colors = model(away, sources)
    assert torch.isfinite(colors.rgb).all() and torch.isfinite(colors.depth).all()
    colors.rgb.sum().backward()
    for name, parameter in model.net_coarse.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name


def test_masked_views_do_not_matter(asked):
    """A view that sees nothing of the ray: moving it about changes nothing but the first query, which the published code leaves unmasked."""
    model, rays, sources = asked
    seen = Seen(torch.rand(5, 6, 3, 11), torch.rand(5, 6, 3, 4), torch.ones(5, 6, 3, 1))
    seen.mask[:, :, 2] = 0
    other = Seen(seen.values, seen.ray_diff.clone(), seen.mask)
    other.ray_diff[:, :, 2] += 1
    points, direction = torch.rand(5, 6, 3), torch.rand(5, 3)
    with torch.no_grad():
        assert torch.equal(model.net_coarse(seen, points, direction)[0], model.net_coarse(other, points, direction)[0])


def test_every_parameter_receives_gradient(asked):
    _, rays, sources = asked
    torch.manual_seed(0)
    model = GNT(TINY).train()
    features = model.encode(sources.images)
    model(rays, sources._replace(features=features)).rgb.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, f"no gradient for {name}"


def test_depth_is_between_the_bounds(asked):
    model, rays, sources = asked
    with torch.no_grad():
        depth = model(rays, sources).depth
    assert (depth >= rays.near).all() and (depth <= rays.far).all()


def test_samples_are_uniform_in_inverse_depth():
    depths = sample_depths(1, 9, 1.2, 10.0, False, "cpu")[0]
    gaps = (1 / depths).diff()
    assert torch.allclose(gaps, gaps[:1].expand(8), atol=1e-6)
    assert depths[0].item() == pytest.approx(1.2) and depths[-1].item() == pytest.approx(10.0)
    jittered = sample_depths(100, 9, 1.2, 10.0, True, "cpu")
    assert (jittered.diff(dim=-1) > 0).all() and jittered.std(dim=0).min() > 0


def test_position_encoding_is_identity_then_sine_and_cosine_an_octave():
    x = torch.tensor([[0.1, 0.2, 0.3]])
    code = encode_position(x)
    assert code.shape == (1, 63)
    assert torch.allclose(code[0, 3:9], torch.cat([x.sin(), x.cos()], dim=-1)[0])
    assert torch.allclose(code[0, 57:63], torch.cat([(512 * x).sin(), (512 * x).cos()], dim=-1)[0], atol=1e-5)


def test_projector_finds_the_pixel_itself():
    """A point lifted from a pixel of a source view is seen there with that pixel's colour, and in no picture behind the camera."""
    scene = normalise(nvs_synthetic.make_scene())
    bank = make_bank(scene, (1,), "cpu")
    rays = camera_rays(scene.camera(1), 1.0, 2.0)
    seen = look_up((rays.origin + 3 * rays.direction)[:, None], rays.origin, bank.select([0]))
    expected = scene.images[1].reshape(-1, 3).float() / 255
    inner = seen.mask[:, 0, 0, 0] > 0
    # The outermost pixels may round to just outside, on some processors all of them.
    assert inner.reshape(scene.images[1].shape[:2])[1:-1, 1:-1].all()
    assert torch.allclose(seen.values[inner, 0, 0], expected[inner], atol=1e-3)
    assert torch.allclose(seen.ray_diff[..., 3], torch.ones(()), atol=1e-4), "same direction: dot product 1"
    behind = look_up((rays.origin - 3 * rays.direction)[:, None], rays.origin, bank.select([0]))
    assert behind.mask.sum() == 0


@pytest.mark.parametrize(("field", "value"), [("width", 30), ("depth", 0), ("samples", 1), ("dropout", 1.0), ("sources", -2)])
def test_wrong_shapes_are_refused(field, value):
    with pytest.raises(UserError, match=f"GNT {field} = {value}"):
        GNTConfig(**{field: value})
